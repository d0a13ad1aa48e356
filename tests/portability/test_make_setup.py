"""`make` makes .venv anew where it cannot be used, and keeps it where it can; Pythons and their pips are stand-ins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PYTHON = """#!/bin/sh
# Says what it is asked for. As a Debian without python3-venv it makes environments without pip, and fails.
echo "$0 $*" >> "{log}"
case "$*" in
"-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ -e "{log}.no-ensurepip" ] && exit 1
    touch "$3/with-pip"
    printf '#!%s/%s/bin/python\\n' "$(pwd -P)" "$3" > "$3/bin/pip" ;;
*" -m pip install"*) [ ! -e "{log}.no-network" ] || exit 1 ;;
*"import pip"*) [ -e "$(dirname "$0")/../with-pip" ] ;;
*) exec {python} "$@" ;;
esac
"""


class Checkout:
    """A folder with the Makefile, and a Python named `fake`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "checkout", folder / "log"
        self.folder.mkdir()
        for file in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / file, self.folder)
        self.python = folder / "fake"
        self.python.write_text(PYTHON.format(log=self.log, python=sys.executable))
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--silent", "-C", str(self.folder), f"PYTHON={self.python}", "TORCH=cpu", *arguments]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        self.log.write_text("")
        return subprocess.run(
            [*command, ".venv/installed"], env={**variables, **environment}, capture_output=True, text=True
        )

    def made(self) -> bool:
        """Whether the last `make` made an environment."""
        return f"{self.python} -m venv .venv" in self.log.read_text().splitlines()

    def installed(self) -> bool:
        return "--requirement requirements.lock" in self.log.read_text()


@pytest.fixture()
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    ended = made.make()
    assert ended.returncode == 0, ended.stderr
    assert made.made()
    assert made.installed()
    return made


def test_what_is_there_is_kept(checkout: Checkout) -> None:
    (checkout.folder / ".venv/kept").touch()
    assert checkout.make().returncode == 0
    assert not checkout.installed()
    os.utime(checkout.folder / "requirements.lock", (2**31, 2**31))  # newer than .venv
    assert checkout.make().returncode == 0
    assert checkout.installed()
    assert not checkout.made()
    assert (checkout.folder / ".venv/kept").is_file()


def test_an_environment_that_was_made_without_pip(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    (tmp_path / "log.no-ensurepip").touch()
    assert checkout.make().returncode == 2
    assert (checkout.folder / ".venv/bin/python").is_file()
    (tmp_path / "log.no-ensurepip").unlink()  # python3-venv is installed
    assert checkout.make().returncode == 0
    assert checkout.made()
    assert checkout.installed()


def test_a_failed_download(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    (tmp_path / "log.no-network").touch()
    ended = checkout.make()
    assert ended.returncode == 2
    assert "torch" in ended.stderr
    (tmp_path / "log.no-network").unlink()
    assert checkout.make().returncode == 0
    assert not checkout.made()  # it is whole
    assert checkout.installed()


@pytest.mark.parametrize("damage", ["python that has gone", "another python", "no pip program", "moved", "empty"])
def test_an_environment_that_cannot_be_used(damage: str, checkout: Checkout) -> None:
    environment = checkout.folder / ".venv"
    if damage == "python that has gone":
        (environment / "bin/python").unlink()
        (environment / "bin/python").symlink_to("/nowhere/python3")
    elif damage == "another python":  # which looks for packages in another folder
        (environment / "with-pip").unlink()
    elif damage == "no pip program":  # Ctrl-C came before it was written
        (environment / "bin/pip").unlink()
        (environment / "installed").unlink()
    elif damage == "moved":
        checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
    else:
        shutil.rmtree(environment)
        environment.mkdir()
    assert checkout.make().returncode == 0
    assert checkout.made()
    assert checkout.installed()
    assert checkout.make().returncode == 0
    assert not checkout.installed()


def test_an_environment_that_lies_elsewhere(checkout: Checkout) -> None:
    """On a larger disk, with a link to it."""
    elsewhere = checkout.folder.parent / "elsewhere"
    shutil.move(checkout.folder / ".venv", elsewhere)
    (elsewhere / "bin/pip").write_text(f"#!{elsewhere}/bin/python\n")
    (checkout.folder / ".venv").symlink_to(elsewhere)
    assert checkout.make().returncode == 0
    assert not checkout.installed()


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.python.write_text(
        checkout.python.read_text().replace(
            f'exec {sys.executable} "$@"',
            f'exec {sys.executable} -c "import sys; sys.version_info = (2, 7, 18); exec(sys.argv[1])" "$2"',
        )
    )
    ended = checkout.make()
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0] == "Python 3.11 to 3.14 is needed, this is 2.7; try: make PYTHON=python3.11"
    assert not checkout.made()


def test_settings_for_other_pythons(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.python.write_text(checkout.python.read_text().replace('echo "$0 $*"', 'echo "$0 $*"; env | grep ^P'))
    settings = {"PIP_USER": "1", "PIP_TARGET": "/x", "PIP_REQUIRE_VIRTUALENV": "1", "PYTHONHOME": "/x"}
    ended = checkout.make(PIP_INDEX_URL="https://mirror", **settings)
    assert ended.returncode == 0, ended.stderr
    told = checkout.log.read_text()
    assert "PIP_INDEX_URL=https://mirror" in told
    assert "PIP_USER=0" in told
    for name in ("PIP_USER=1", "PIP_TARGET", "PIP_REQUIRE_VIRTUALENV", "PYTHONHOME"):
        assert name not in told
