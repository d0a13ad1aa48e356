"""Every stage and command in a Python that lacks what macOS's lacks (like_macos/sitecustomize.py says what)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests import ROOT, needs_linux
from tests.end_to_end.test_pipeline import clone
from tests.reliability.support.stage_processes import STAGES, make_project, run_stages

LIKE_MACOS = ROOT / "tests/portability/like_macos"

pytestmark = needs_linux  # elsewhere there is less to take away, and every other test tries the rest


def run(command: Sequence[str], folder: Path, code: Path) -> str:
    """What ``command`` writes in ``folder``, with ``code`` as the project's."""
    program = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{LIKE_MACOS}:{code}",
        "PATH": f"{program}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    environment.pop("OMP_NUM_THREADS")  # the program shall count processors by itself
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_every_stage_and_command(tmp_path: Path) -> None:
    project = tmp_path / "project"
    told = run([sys.executable, "-m", "tests.portability.every_stage", str(project)], ROOT, ROOT)
    assert [stage for stage in STAGES if f"{stage}: done in" in told] == list(STAGES)
    assert "BrierLM" in told
    assert set(json.loads((project / "results/timings.json").read_text())) == set(STAGES)
    report = (project / "results/report.html").read_text(encoding="utf-8")
    assert "Apple M0" in report  # so it has been a Mac, as far as one can tell from inside
    # macOS's file systems take names that differ in case alone for one.
    names = [str(path.relative_to(project)) for path in project.rglob("*")]
    assert len({name.casefold() for name in names}) == len(names)


def test_no_two_files_of_the_repository_differ_in_case_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.splitlines()
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    run_stages(project, "check_params", "digest_corpus", "tokenise", "match_compute")
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["runtime"].update(launcher="torchrun", processes=2, threads="auto")
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    told = run([sys.executable, "-m", "stages.train_transformer"], project, ROOT)
    assert told.count("train_transformer: done in") == 1


@pytest.mark.slow
def test_the_pipeline(tmp_path: Path) -> None:
    """DVC, too, and each stage in a Python that starts without these functions."""
    folder = clone(tmp_path)
    told = run(["dvc", "repro"], folder, folder)
    assert [stage for stage in STAGES if f"{stage}: done in" in told] == list(STAGES)
    assert "Apple M0" in (folder / "results/report.html").read_text(encoding="utf-8")
    assert (folder / "dvc.lock").is_file()


@pytest.mark.slow
def test_what_runs_beside_the_stages_can_be_imported() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("benchmarks", "flows", "verification")
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    assert len(modules) > 10
    run([sys.executable, "-c", f"import {', '.join(modules)}"], ROOT, ROOT)
