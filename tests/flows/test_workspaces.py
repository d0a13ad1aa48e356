import subprocess
import sys
from pathlib import Path

import pytest

from calm_core.errors import CalmError
from flows import workspaces
from flows.workspaces import WorkspaceBusyError, exclusive

HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".dvc").touch()  # as good as read-only, for root as well
    with (
        pytest.raises(CalmError, match=r"^cannot lock .*flows.lock: Not a directory; make it writable"),
        exclusive(tmp_path, True, print),
    ):
        pass


def test_a_run_waits_for_another_and_goes_on_when_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "POLL_SECONDS", 0.01)
    told: list[str] = []
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".dvc/tmp/flows.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(WorkspaceBusyError, match="another flow run works in"),
            exclusive(tmp_path, False, told.append),
        ):
            pass
        assert not told

        def say(line: str) -> None:
            told.append(line)
            holder.kill()

        with exclusive(tmp_path, True, say):
            assert told == [f"waiting for another flow run in {tmp_path}"]
            with pytest.raises(WorkspaceBusyError), exclusive(tmp_path, False, told.append):
                pass
    with exclusive(tmp_path, False, told.append):
        pass
    assert len(told) == 1
