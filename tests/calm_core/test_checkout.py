"""What DVC refuses is refused before, with a remedy that DVC then accepts."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from calm_core.checkout import require_checkout
from calm_core.errors import CalmError
from tests import ROOT

STAGE = "stages:\n  hello:\n    cmd: echo hello > hello.txt\n    outs: [hello.txt]\n"


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "b",
        "DVC_NO_ANALYTICS": "1",
    }  # fmt: skip
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture()
def archive(tmp_path: Path) -> Path:
    """A project as an archive of it holds it: all files and no .git."""
    (tmp_path / "dvc.yaml").write_text(STAGE)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    return tmp_path


def remedies(folder: Path) -> list[str]:
    """What stands between backquotes in the message for ``folder``, which is a line that `make repro` prints, too."""
    with pytest.raises(CalmError) as told:
        require_checkout(folder)
    assert "\n" not in str(told.value)
    ended = command(folder, sys.executable, "-m", "calm_core.checkout")
    assert ended.stderr == f"{told.value}\n"
    assert ended.returncode == 1
    return str(told.value).split("`")[1::2]


@pytest.mark.parametrize("number", [0, 1])
def test_an_archive(archive: Path, number: int) -> None:
    assert command(archive, "dvc", "repro").returncode != 0
    found = remedies(archive)
    assert len(found) == 2
    for part in found[number].split(" && "):
        assert command(archive, *shlex.split(part)).returncode == 0
    require_checkout(archive)
    assert command(archive, "dvc", "repro").returncode == 0
    assert (archive / "hello.txt").read_text() == "hello\n"


def test_an_experiment_needs_git(archive: Path) -> None:
    (archive / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    require_checkout(archive)
    with pytest.raises(CalmError, match=r"`git init && .* makes one; experiments need one$"):
        require_checkout(archive, experiments=True)


@pytest.mark.parametrize("in_git", [False, True])
def test_a_copy_without_hidden_folders(archive: Path, in_git: bool) -> None:
    (archive / ".dvc/config").unlink()
    (archive / ".dvc").rmdir()
    if in_git:
        command(archive, "git", "init", "--quiet")
    *_, remedy = remedies(archive)
    assert command(archive, *shlex.split(remedy)).returncode == 0
    require_checkout(archive)
    assert command(archive, "dvc", "repro").returncode == 0


def test_what_is_in_order(archive: Path) -> None:
    (archive / ".git").write_text("gitdir: elsewhere\n")  # a worktree, a submodule
    require_checkout(archive)
    (archive / "inside/.dvc").mkdir(parents=True)
    require_checkout(archive / "inside")
    require_checkout(archive, experiments=True)


def test_braces(archive: Path) -> None:
    """DVC fills its cache's path in as Python fills in a format."""
    folder = archive / "a {b}"
    folder.mkdir()
    for name in ("dvc.yaml", ".dvc"):
        (archive / name).rename(folder / name)
    command(folder, "git", "init", "--quiet")
    assert command(folder, "dvc", "repro").returncode != 0
    remedy = remedies(folder)[0]
    assert command(folder, *shlex.split(remedy.replace("FOLDER", str(archive / "cache")))).returncode == 0
    require_checkout(folder)
    assert command(folder, "dvc", "repro").returncode == 0
