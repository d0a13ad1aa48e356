"""What one waits for when there is nothing to do: `dvc repro` on a finished pipeline, and `calm --help`.

The pipeline is that of the smoke preset, run once in a clone of the last commit. It has the stages and files of the
default run; DVC compares these by size and time of change, so that it does not matter how large they are. Both goals
are in seconds: the median is told, and beside it the processor's own, which other work on the machine moves less.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Result, seconds_of
from verification.smoke_run import environment, smoke_run

ROUNDS = 9


def starting() -> list[Result]:
    """Both commands."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        clone = Path(name) / "clone"
        smoke_run(clone)
        return [
            _waited("dvc repro with nothing to do", [sys.executable, "-m", "dvc", "repro"], clone, 3.0),
            _waited("calm --help", [sys.executable, "-m", "calm_core.cli", "--help"], clone, 1.0),
        ]


def _waited(name: str, command: Sequence[str], folder: Path, goal: float) -> Result:
    def run() -> None:
        ended = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"{name}: {ended.stderr.strip()}")

    run()
    waited, worked = [], []
    for _ in range(ROUNDS):
        before = _processor_seconds()
        waited.append(seconds_of(run))
        worked.append(_processor_seconds() - before)
    details = {"seconds": waited, "processor_seconds": statistics.median(worked)}
    return Result(name, "the clock", statistics.median(waited), "s", "<=", goal, details)


def _processor_seconds() -> float:
    """What all child processes so far have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
