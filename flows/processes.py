"""Commands of a flow run: their output line by line, and all of them stopped when the run ends."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from flows.git import environment as git_environment

GUARD = Path(__file__).with_name("guard.py")


class Processes:
    """The commands that one flow run has started; ``stop`` ends them, and so does the death of this process."""

    # Weak: a finished flow run is not kept alive by being listed.
    _all: ClassVar["weakref.WeakSet[Processes]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._all.add(self)
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, command: list[str], folder: Path, on_line: Callable[[str], None]) -> int:
        """Run ``command`` in ``folder``, give ``on_line`` each line of its output as it comes; returns its exit status.

        The environment's own programs come first on PATH, since stages start as `python -m stages.NAME`.

        Raises:
            RuntimeError: ``stop`` was called before.
        """
        if self._stopped:
            raise RuntimeError("the run was stopped")
        environment = {
            **git_environment(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            # The guard's standard input is the lifeline: it closes when this process closes it or dies. With -S and -E
            # Python starts faster, and neither site-packages nor PYTHON* variables can change the guard.
            [sys.executable, "-S", "-E", str(GUARD), *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._running.add(process)
        try:
            # Again, since ``stop`` may have run between the check above and the entry in the set.
            if self._stopped:
                process.stdin.close()
            for line in process.stdout:
                on_line(line.rstrip())
            return process.wait()
        finally:
            process.stdin.close()
            process.wait()
            self._running.discard(process)

    @classmethod
    def stop_all(cls) -> None:
        """End the commands of every flow run in this process."""
        for processes in list(cls._all):
            processes.stop()

    def stop(self) -> None:
        """End every command, and refuse new ones; returns at once."""
        self._stopped = True
        for process in list(self._running):
            if process.stdin is not None:
                process.stdin.close()
