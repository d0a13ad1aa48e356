"""`make repro` in folders with names that a shell or make would read as their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

DVC = """#!/bin/sh
echo "dvc $*"
"""


@pytest.mark.parametrize("name", ["a b", "$HOME", "`id`", "it's", 'a "b', "100% #2", "$(error no)"])
def test_the_environment_is_that_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".dvc").mkdir()
    for file in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    (folder / ".venv/bin/dvc").write_text(DVC)
    (folder / ".venv/bin/dvc").chmod(0o755)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/installed").write_text("cpu\n")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "GIT_CEILING_DIRECTORIES": str(tmp_path)}

    def make() -> subprocess.CompletedProcess[str]:
        command = ["make", "--silent", "-C", str(folder), "repro"]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    refused = make()
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[0].startswith(f"{folder} is in no git repository: `git init && ")
    (folder / ".git").mkdir()
    ended = make()
    assert ended.stdout == "dvc repro\n", ended.stderr
