"""Homes that cannot be written: libraries' caches go elsewhere, and what can be written stays as it is chosen."""

import errno
import fcntl
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calm_core.runtime.caches import is_writable, use_writable_caches
from tests import ROOT, needs_linux

VARIABLES = ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "MPLCONFIGDIR")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        # Set first, so that what is set meanwhile is undone, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def chosen() -> dict[str, str]:
    use_writable_caches()
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_home_that_can_be_written_stays(tmp_path: Path) -> None:
    assert chosen() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"])
def test_what_cannot_be_written_is_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()  # no folder: that cannot be written by any user
    monkeypatch.setenv(name, str(tmp_path / "file/home"))
    replaced = {
        "HOME": VARIABLES,
        "XDG_CACHE_HOME": VARIABLES[:2],
        "HF_HOME": VARIABLES[:2],
        "HF_DATASETS_CACHE": VARIABLES[:1],
    }[name]
    found = chosen()
    assert tuple(found) == replaced
    assert all(Path(folder).is_dir() and is_writable(folder) for folder in found.values())


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwuid(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    assert tuple(chosen()) == VARIABLES


def test_a_hub_that_is_there_is_read_though_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".cache/huggingface/hub").mkdir(parents=True)
    monkeypatch.setattr("calm_core.runtime.caches.is_writable", lambda folder: "huggingface" not in folder)
    assert tuple(chosen()) == ("HF_DATASETS_CACHE",)


def test_a_home_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert tuple(chosen()) == VARIABLES


@needs_linux
@pytest.mark.parametrize("home", ["/proc", pytest.param("/dev/null", marks=pytest.mark.slow)])
def test_a_dataset_is_read_and_figures_are_drawn_whatever_the_home(home: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    program = (
        "import stages, datasets, matplotlib.pyplot\n"
        "print([row['text'] for row in datasets.load_dataset('texts', split='train', streaming=True)])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, "HOME": home, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['one', 'two']\n", "")
