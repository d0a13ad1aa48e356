"""What every stage does around its own work: validate params, time the work, tell mistakes in one line."""

import errno
import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from calm_core.artefacts import write_json, write_text
from calm_core.errors import CalmError
from calm_core.params import Params, load_params

TIMINGS = Path("results/timings.json")
"""Seconds and rates of each stage when it last ran on this machine.

Not an output that DVC tracks: the time a stage takes is the one thing that a second run does not reproduce.
The report shows it from a script beside it, results/timings.js, if that is there.
"""

Measured = dict[str, float]
"""Figures of speed that a stage returns, by name, units in the names."""


def run_stage(name: str, work: Callable[[Params], Measured | None]) -> None:
    """Run ``work`` as the stage ``name`` and end the process: status 0, or 1 after one line on standard error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    try:
        measured = work(load_params()) or {}
        _record(name, time.monotonic() - started, measured)
    except CalmError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise
        sys.exit(f"{name}: cannot write {error.filename or 'outputs'}: {error.strerror}")


def _record(name: str, seconds: float, measured: Measured) -> None:
    try:
        timings = json.loads(TIMINGS.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        timings = {}
    timings[name] = {"seconds": round(seconds, 3), **measured, "machine": platform.node()}
    write_json(TIMINGS, timings)
    write_text(TIMINGS.with_suffix(".js"), f"window.timings = {json.dumps(timings)};\n")
    rates = "".join(f", {key.replace('_', ' ')} {value:,.0f}" for key, value in measured.items())
    print(f"{name}: done in {seconds:.1f} s{rates}", file=sys.stderr, flush=True)
