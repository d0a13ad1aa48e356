"""DVC and text that git does not know: what runs when the text changes, in the tree and in DVC's copies of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stages.runner.run import ALWAYS_RUN
from tests import ROOT
from tests.reliability.support.stage_processes import make_project


def dvc(project: Path, *arguments: str) -> str:
    """What DVC tells of ``arguments``."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "DVC_NO_ANALYTICS": "1",
    }
    ended = subprocess.run(
        ["dvc", *arguments], cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def ran(told: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", told)


def tokens(folder: Path) -> int:
    splits = json.loads((folder / "data/tokens/description.json").read_text())["splits"]
    return sum(split["tokens"] for split in splits.values())


@pytest.fixture()
def project(tmp_path: Path) -> Path:
    """The small project in git, but for its text."""
    folder = make_project(tmp_path / "pro #ject")
    (folder / "text").mkdir()
    (folder / "corpus.txt").rename(folder / "text/a.txt")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["corpus"]["paths"] = ["text/*.txt"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text() + "/text/\n")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "--all"), (*identity, "commit", "--quiet", "--message", "project")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def a_line_more(text: Path) -> None:
    (text / "a.txt").open("a").write("\nand nine words of one line more in the text")


def a_file_more(text: Path) -> None:
    (text / "b.txt").write_text("and one document of another file that the glob finds")


@pytest.mark.slow
@pytest.mark.parametrize("change", [a_line_more, a_file_more])
def test_changed_text_is_tokenised_again(project: Path, change: Callable[[Path], None]) -> None:
    assert ran(dvc(project, "repro", "tokenise")) == ["check_params", "digest_corpus", "tokenise"]
    before, lock = tokens(project), (project / "dvc.lock").read_bytes()
    os.utime(project / "text/a.txt")
    assert ran(dvc(project, "repro", "tokenise")) == ["digest_corpus"]
    assert (project / "dvc.lock").read_bytes() == lock
    change(project / "text")
    assert ran(dvc(project, "repro", "tokenise")) == ["digest_corpus", "tokenise"]
    assert tokens(project) > before


@pytest.mark.slow
def test_an_experiment_in_a_copy_has_the_text(project: Path, tmp_path: Path) -> None:
    # DVC takes the sign in the name for one of a URL's: docs/flows.md.
    project = project.rename(tmp_path / "project")
    dvc(project, "repro", "tokenise")
    before = tokens(project)
    told = dvc(project, "exp", "run", "--temp", "--name", "smaller", "-S", "tokenizer.vocabulary_size=280", "tokenise")
    assert ran(told) == ["check_params", "digest_corpus", "tokenise"]
    # The same text, in more tokens, which are the experiment's and not the tree's.
    (documents, found), *_ = re.findall(r"train: ([\d,]+) documents, ([\d,]+) tokens", told)
    train = json.loads((project / "data/tokens/description.json").read_text())["splits"]["train"]
    assert int(documents.replace(",", "")) == train["documents"]
    assert int(found.replace(",", "")) > train["tokens"]
    assert tokens(project) == before


def test_tokenise_follows_what_always_runs() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert [name for name, stage in stages.items() if stage.get("always_changed")] == sorted(ALWAYS_RUN)
    text, models = (next(iter(out)) for out in stages["digest_corpus"]["outs"])
    assert text in stages["tokenise"]["deps"]
    for model in ("autoencoder", "calm", "transformer"):
        assert f"{models}/{model}.json" in stages[f"train_{model}"]["deps"]
