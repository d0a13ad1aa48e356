"""Standard streams as shells leave them: no traceback, the right status, and nothing of one stream in another."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, needs_linux

STAGES = [path.stem for path in sorted((ROOT / "stages").glob("*.py")) if path.stem != "__init__"]
OF_PARAMS = ("check_params", "digest_corpus", "match_compute", "benchmark_flops")
WITH_INPUTS = [stage for stage in STAGES if stage not in OF_PARAMS]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def shell(line: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Status, output and errors of ``line``, in which PYTHON is this one."""
    ended = subprocess.run(
        ["bash", "-c", line.replace("PYTHON", sys.executable)],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        # Ctrl-C is ignored by whatever a shell runs in the background, these tests perhaps.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A fresh clone, as far as stages and `calm` read it."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("presets", "stages", "calm_core"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


CHECK = "PYTHON -m calm_core.cli check"


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        (f"{CHECK} >&-", 2, "calm: standard output is closed; send it to a file, or to /dev/null\n"),
        ("PYTHON -m calm_core.cli generate --model models/calm --prompt a >&-", 2, "calm: standard output is closed"),
        (f"{CHECK} >&- 2>&- <&-", 2, ""),
        (f"{CHECK} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("PYTHON -m calm_core.cli --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        pytest.param("PYTHON -m calm_core.cli plan | true; exit ${PIPESTATUS[0]}", 0, "", marks=pytest.mark.slow),
        ("PYTHON -m calm_core.cli preset nothing 2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
    ],
)
def test_calm(line: str, status: int, told: str, folder: Path) -> None:
    found = shell(line, folder)
    assert found[0] == status
    assert found[2].startswith(told)
    assert len(found[2].splitlines()) == bool(told)


@needs_linux
@pytest.mark.parametrize("command", ["check", "--help", pytest.param("plan", marks=pytest.mark.slow)])
def test_a_full_disk_takes_no_output(command: str, folder: Path) -> None:
    told = "calm: output: No space left on device\n"
    assert shell(f"PYTHON -m calm_core.cli {command} > /dev/full", folder) == (2, "", told)


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "cp1252"}]
)
def test_what_a_terminal_cannot_say(environment: dict[str, str], folder: Path) -> None:
    (folder / "presets").unlink()
    (folder / "presets").mkdir()
    (folder / "presets/łąka.yaml").touch()
    status, output, _ = shell("PYTHON -m calm_core.cli preset", folder, **environment)
    assert status == 0
    assert output.strip() in ("łąka", r"\u0142\u0105ka")
    status, _, told = shell("PYTHON -m calm_core.cli preset ß", folder, **environment)
    assert status == 2
    assert told.startswith("calm: preset ")


def test_errors_do_not_become_output(folder: Path) -> None:
    """On a standard error that is closed: Python's print would take standard output in its place."""
    assert shell("PYTHON -m stages.check_params 2>&-", folder) == (0, "", "")
    assert json.loads((folder / "data/params_checked.json").read_text()) == {"valid": True}
    assert shell("PYTHON -m calm_core.cli preset nothing 2>&-", folder) == (2, "", "")


@pytest.mark.parametrize(
    ("streams", "status"),
    [(">&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0), ("2>&1 | true; exit ${PIPESTATUS[0]}", 128 + signal.SIGPIPE)],
)
def test_a_stage(streams: str, status: int, folder: Path) -> None:
    assert shell(f"PYTHON -m stages.check_params {streams}", folder)[0] == status
    assert (folder / "data/params_checked.json").is_file()


def test_a_file_does_not_get_the_number_of_a_closed_stream(folder: Path) -> None:
    program = (
        "from calm_core.runtime.standard_streams import open_closed_streams\n"
        "print_to = open_closed_streams()\n"
        "file = open('file', 'w')\n"
        "import subprocess, sys\n"
        "subprocess.run('echo harm; echo harm >&2', shell=True)\n"
        "print('harm'); print('harm', file=sys.stderr)\n"
        "file.write(' '.join(print_to))\n"
    )
    (folder / "program.py").write_text(program)
    assert shell("PYTHON program.py >&- 2>&- <&-", folder) == (0, "", "")
    assert (folder / "file").read_text() == "stdin stdout stderr"


@pytest.mark.parametrize(
    "stage", [stage if stage == "tokenise" else pytest.param(stage, marks=pytest.mark.slow) for stage in WITH_INPUTS]
)
def test_a_stage_by_hand_in_a_fresh_clone(stage: str, folder: Path) -> None:
    status, output, told = shell(f"PYTHON -m stages.{stage}", folder)
    assert (status, output) == (1, "")
    assert len(told.splitlines()) == 1
    assert re.fullmatch(rf"{stage}: (data|results)/\S+ is missing; `dvc repro` makes it\n", told)


PROGRAMS = {"stage": "PYTHON -m stages.tokenise", "calm": "PYTHON bin/calm generate --model nothing --prompt a"}


@pytest.mark.parametrize(
    ("program", "module"), [("stage", "pydantic"), ("stage", "tokenizers"), ("calm", "typer"), ("calm", "tokenizers")]
)
def test_ctrl_c_during_imports(program: str, module: str, folder: Path) -> None:
    """The signal comes when ``module`` is imported: here from a stand-in of it."""
    (folder / "bin").mkdir()
    (folder / "bin/calm").write_text("from calm_core.cli import main\nmain()\n")
    (folder / "stand_ins").mkdir()
    (folder / f"stand_ins/{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (folder / "data").mkdir()
    line = f"exec {PROGRAMS[program]}"
    status, output, told = shell(line, folder, PYTHONPATH=f"{folder}/stand_ins:{ROOT}")
    assert status in (130, -signal.SIGINT)
    assert (output, told) == ("", "")
