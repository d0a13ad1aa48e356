"""A stage in a process of its own: what it says is passed on, and the system tells how much memory it took."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from calm_core.errors import CalmError


class Finished(NamedTuple):
    """What a stage took from its start to its end, the import of its libraries included."""

    seconds: float
    peak_bytes: int
    """Largest resident memory of its process; no less than this one had when it started it, which Linux counts too."""


def run_stage(name: str, command: str, folder: Path, environment: Mapping[str, str]) -> Finished:
    """Run ``command``, `python -m ...`, with this very Python in ``folder``; its output goes to standard error.

    Raises:
        CalmError: the stage failed; with the last line that it wrote.
    """
    started = time.monotonic()
    _, *arguments = shlex.split(command)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    last = ""
    try:
        for line in process.stdout:
            last = line.strip() or last
            print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
        # Not process.wait: it keeps what the system tells about this process alone to itself.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:  # Ctrl-C and the like
        process.terminate()
        process.wait()
        raise
    if process.returncode < 0:
        raise CalmError(
            f"{name} was killed by signal {-process.returncode}, as a system without free memory does; "
            f"its last line: {last or 'none'}"
        )
    if process.returncode:
        # A mistake is told by the stage's name; the end of a traceback is not.
        told = last if last.startswith(f"{name}: ") else f"{name} failed with status {process.returncode}: {last}"
        raise CalmError(told)
    # Bytes on macOS, kB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(time.monotonic() - started, usage.ru_maxrss * unit)
