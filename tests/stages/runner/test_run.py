import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_core.errors import CalmError
from stages.runner.run import _alone, _run
from tests import ROOT

HOLDER = """
import errno, fcntl, os, sys
from stages.runner.run import _alone, _run

def missing(*arguments):
    raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))

if sys.argv[1] != "0":
    fcntl.flock = missing
with _alone("train_calm"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hold(*arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HOLDER, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def fail_with(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [0, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_the_lock_names_its_holder_and_goes_with_it(
    number: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where flock ends in the error ``number``, as on some network file systems."""
    if number:
        fail_with(monkeypatch, number)
    for holder in hold(str(number)):
        with pytest.raises(CalmError, match=f"^process {holder.pid} runs this stage here already; wait for it or stop"):
            _alone("train_calm").__enter__()
        with _alone("train_transformer"):  # each stage has a lock of its own
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        for _ in range(2):
            with _alone("train_calm"):
                assert (project / ".checkpoints/train_calm.pid").read_text() == str(os.getpid())


def test_errors_of_the_work_are_not_those_of_the_lock(project: Path) -> None:
    with pytest.raises(TimeoutError, match="of the work"), _alone("train_calm"):
        raise TimeoutError("of the work")
    with pytest.raises(OSError, match="No locks"), _alone("train_calm"):
        raise OSError(errno.ENOLCK, "No locks")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EIO, "Input/output error", "data/tokens/a"), "data/tokens/a cannot be used: Input/output error"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x cannot be used: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write outputs: No space left on device"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found"),
            "a file cannot be used: No usable tem",
        ),
    ],
)
def test_errors_of_the_system_are_told_in_one_line(error: OSError, told: str, project: Path) -> None:
    shutil.copy(ROOT / "params.yaml", project)

    def work(params: object) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        _run("train_calm", work, [])
    assert str(ended.value).startswith(f"train_calm: {told}")
    assert str(ended.value).endswith(", then run `dvc repro` again")


def test_a_fault_of_the_program_keeps_its_traceback(project: Path) -> None:
    shutil.copy(ROOT / "params.yaml", project)

    def work(params: object) -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        _run("train_calm", work, [])
