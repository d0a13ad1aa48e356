"""What every stage does around its work: validate params, lock, time it, handle signals, report errors in one line."""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import Timeout

from calm_core.errors import CalmError, one_line
from calm_core.params import Params, load_params
from calm_core.runtime.launcher import is_one_of_many, rank_in_environment
from calm_core.runtime.standard_streams import give_up, open_closed_streams
from calm_core.storage.atomic import write_text
from calm_core.storage.json_io import write_json
from calm_core.storage.lock import acquire
from stages.runner.launch import (
    LOST_CONTACT,
    FirstFailedError,
    end_with_parent,
    launch,
    leave_at_once,
    leave_to_launcher,
    lost_contact,
)
from stages.runner.places import Places, asked_places

TIMINGS = Path("results/timings.json")
"""Seconds and rates of each stage when it last ran on this machine.

Not an output that DVC tracks: the time a stage takes is the one thing that a second run does not reproduce.
The report shows it from a script beside it, results/timings.js, if that is there.
"""

CHECKPOINTS = Path(".checkpoints")
"""Interrupted work (``resume``), and a lock for each stage; no output of any stage."""

FINISHED = "finished"
"""The file in a folder of interrupted work that says that the outputs of the stage are written."""

ALWAYS_RUN = frozenset({"digest_corpus"})
"""Stages that DVC begins with, whatever became of the outputs of the one before."""

GRACE_SECONDS = 4.0
"""How long after Ctrl-C or SIGTERM a stage may still be at work."""

Measured = dict[str, float]
"""Figures of speed that a stage returns, by name, units in the names."""

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run_stage(name: str, work: Callable[[Params], Measured | None], by_processes: bool = False) -> None:
    """Run ``work`` as the stage ``name`` and end the process: status 0, or another after one line on standard error.

    The status is 130 after Ctrl-C, 143 after SIGTERM, 141 when the reader of what it prints has gone, and 1 after a
    mistake in params or data, a disk that is full or cannot be written, or a lack of memory.

    A stage that works ``by_processes`` is launched as ``runtime.launcher`` says, or was by torchrun: then rank 0 holds
    the stage's lock and reports errors, and the other ranks hand theirs to the launcher.
    """
    _run_until_the_end(name, work, [f"stages.{name}"] if by_processes else [])


def run_repeatable_stage(
    name: str, work: Callable[[Params, Places], Measured | None], by_processes: bool = False, of_calm: bool = False
) -> None:
    """Run ``work`` as ``run_stage`` does, under the seed and in the places that the command line asks for.

    A stage ``of_calm`` alone can be asked for the CALM of a preset.
    """
    places = asked_places(sys.argv[1:], of_calm)

    def there(params: Params) -> Measured | None:
        return work(places.params(params), places)

    command = [f"stages.{name}", *sys.argv[1:]] if by_processes else []
    _run_until_the_end(places.stage(name), there, command)


def _run_until_the_end(name: str, work: Callable[[Params], Measured | None], command: list[str]) -> None:
    """``run_stage`` of a stage whose processes `python -m` starts by ``command``; empty if it has no more than one."""
    open_closed_streams()
    if is_one_of_many():
        end_with_parent()
    _end_within_seconds(name)
    try:
        _run(name, work, command)
    except _Stopped as stopped:  # perhaps while another error was being told
        if not is_one_of_many():  # whoever launched it tells
            with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe, too
                print(f"{name}: stopped by {stopped}; `dvc repro` goes on", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.signal)
    except SystemExit as ended:
        if is_one_of_many():
            leave_at_once(ended.code)
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # this process is about to end anyway


def _run(name: str, work: Callable[[Params], Measured | None], command: list[str]) -> None:
    started = time.monotonic()
    try:
        params = load_params()
        if command and params.runtime.launcher == "torchrun" and not is_one_of_many():
            launch(name, command, params.runtime.processes)
        elif rank_in_environment() > 0:
            work(params)
        else:
            with _alone(name):
                _remove_finished(name)
                measured = work(params) or {}
                _record(name, time.monotonic() - started, measured)
        sys.stdout.flush()
    except FirstFailedError:
        sys.exit(1)
    except CalmError as error:
        _fail(f"{name}: {error}")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not is_one_of_many():  # as in `python -m stages.report | head`
            give_up(sys.stdout, sys.stderr)
            sys.exit(128 + signal.SIGPIPE)
        reason = _machine_failure(error)
        if reason is None and is_one_of_many() and lost_contact(error):
            leave_to_launcher(f"{name}: {LOST_CONTACT}")
            sys.exit(1)
        if reason is None:
            raise
        _fail(f"{name}: {reason}, then run `dvc repro` again")


def _fail(line: str) -> NoReturn:
    if rank_in_environment() > 0:
        leave_to_launcher(line)
        sys.exit(1)
    sys.exit(line)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM has come."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__("Ctrl-C" if self.signal == signal.SIGINT else self.signal.name)


def _end_within_seconds(name: str) -> None:
    """From now on Ctrl-C and SIGTERM raise ``_Stopped``, and end the process some seconds later whatever it does."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _Stopped(number)

    def watch() -> None:
        # Signals that a library handles are written here, too.
        while (number := os.read(reading, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        time.sleep(GRACE_SECONDS)
        told = (
            f"{name}: stopped by {_Stopped(number)} in the middle of a step; `dvc repro` goes on from what is saved\n"
        )
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), told.encode())
        os._exit(128 + number)

    # Python runs a handler between two of its own instructions only, which a long computation in C++ keeps it from; the
    # descriptor is written to at once, and a thread can read it meanwhile.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold the stage's lock, which goes with the process, however it ends.

    Raises CalmError if another process holds it, such as one that outlived a killed DVC.
    """
    CHECKPOINTS.mkdir(exist_ok=True)
    # The content of the lock file is the library's.
    holder = CHECKPOINTS / f"{name}.pid"
    try:
        held = acquire(CHECKPOINTS / f"{name}.lock")
    except Timeout:
        process = holder.read_text(encoding="utf-8") if holder.exists() else "that has just started"
        raise CalmError(f"process {process} runs this stage here already; wait for it or stop it") from None
    with held:
        write_text(holder, str(os.getpid()))
        yield


def _remove_finished(name: str) -> None:
    """Remove the interrupted work of stages whose outputs are written, since DVC, going on to this stage, has them.

    Those of this stage stay: if it runs again then DVC could not keep its outputs, for lack of room for instance.
    """
    if name in ALWAYS_RUN:
        return
    for marker in CHECKPOINTS.glob(f"*/{FINISHED}"):
        if not marker.parent.name.startswith(f"{name}-"):
            shutil.rmtree(marker.parent, ignore_errors=True)


def _machine_failure(error: Exception) -> str | None:
    """What the machine lacks and what to do about it, as one line; None if ``error`` is of another kind."""
    text = one_line(error)
    # Libraries written in Rust tell the error of the system in their message alone.
    told = re.search(r"\(os error (\d+)\)", text)
    number = error.errno if isinstance(error, OSError) and error.errno else int(told[1]) if told else None
    if number in _UNWRITABLE:
        place = getattr(error, "filename", None) or "outputs"
        return f"cannot write {place}: {os.strerror(number)}; free some disk space or make it writable"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError) and number not in (None, errno.ENOMEM):
        return f"{error.filename or 'a file'} cannot be used: {error.strerror}; mend that"
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or number == errno.ENOMEM or "can't allocate memory" in text or "backend out of memory" in text:
        wanted = re.search(r"(?i)tried to allocate ([\d.]+ ?\w+)", text)
        return f"out of memory{f' ({wanted[0]})' if wanted else ''}; lower the batch or the model in params.yaml"
    return None


def _record(name: str, seconds: float, measured: Measured) -> None:
    try:
        timings = dict(json.loads(TIMINGS.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # it is nobody's contract: what is not whole starts anew
        timings = {}
    timings[name] = {"seconds": round(seconds, 3), **measured, "machine": platform.node()}
    write_json(TIMINGS, timings)
    write_text(TIMINGS.with_suffix(".js"), f"window.timings = {json.dumps(timings)};\n")
    rates = "".join(f", {key.replace('_', ' ')} {_figure(value)}" for key, value in measured.items())
    print(f"{name}: done in {seconds:.1f} s{rates}", file=sys.stderr, flush=True)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
