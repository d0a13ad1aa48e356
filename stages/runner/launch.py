"""A stage in several processes of one machine: torchrun's elastic agent starts, monitors and stops them as a group.

`torchrun --nproc-per-node 4 -m stages.train_calm` does the same by hand, also on several machines; with --max-restarts
it resumes from the last checkpoint when a process dies.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from calm_core.errors import CalmError

LOST_CONTACT = "lost contact with another of its processes"
"""The message of a process that failed only because another one did."""


class FirstFailedError(Exception):
    """The first process has ended with an error, and tells it; there is nothing to add."""


def launch(name: str, command: list[str], processes: int) -> None:
    """Run the stage ``name``, which `python -m` starts by ``command``, in ``processes`` processes until all are done.

    When one of them fails the others are stopped too. Then this process exits as ``run.run_stage`` describes, after a
    line about the process that was the cause, unless that process has printed one.
    """
    # Here, so that stages without processes do not wait for the import of torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.set_wakeup_fd(-1)  # the agent handles signals: it forwards them and waits for its processes
    logging.disable(logging.ERROR)  # it would log a page about every failure
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{name}-{os.getpid()}",
        # A free port, so that stages side by side do not meet, and an address that needs no name of this machine.
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        # A mistake would fail again, and `dvc repro` resumes anyway.
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", *command)
    except ChildFailedError as failed:
        _tell(name, processes, failed)
    except SignalException as stopped:
        print(f"{name}: stopped by {stopped.sigval.name}; `dvc repro` goes on", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.sigval)


def leave_to_launcher(line: str) -> None:
    """Report to torchrun why this process, which is not the first, ends; without torchrun, print it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(CalmError(line))
    else:
        print(line, file=sys.stderr, flush=True)


def leave_at_once(code: Any) -> NoReturn:
    """End this process, one of several, as `sys.exit(code)` does, but for what Python frees at its end.

    After an error that is the process group, held by the traceback: gloo then waits for a thread of its own, which may
    be waiting for Python's lock. One process in fifty or so never ended.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def lost_contact(error: Exception) -> bool:
    """Whether ``error`` was caused by the end of another process."""
    # By words, since gloo raises a plain RuntimeError.
    text = f"{type(error).__name__} {error}"
    return any(sign in text for sign in ("DistError", "DistBackendError", "DistNetworkError", "gloo", "NCCL"))


def end_with_parent() -> None:
    """Start a watchdog that ends this process within a second of the launcher's end, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        # An orphan gets another parent.
        while os.getppid() == parent:
            time.sleep(1.0)
        # Not sys.exit, which would end this thread alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tell(name: str, processes: int, failed: "ChildFailedError") -> NoReturn:  # type: ignore[name-defined]  # noqa: F821
    # The likeliest cause first: a killed process, then one that failed by itself, then those that lost contact with it.
    rank, failure = min(
        failed.failures.items(), key=lambda item: (item[1].exitcode >= 0, LOST_CONTACT in str(item[1].message), item[0])
    )
    which = f"process {rank + 1} of {processes}"
    if failure.exitcode < 0:
        killer = signal.Signals(-failure.exitcode).name
        sys.exit(f"{name}: {which} was killed by {killer}; `dvc repro` goes on from what is saved")
    recorded = failure.error_file_data.get("message")
    if isinstance(recorded, dict):
        sys.exit(f"{which}: {recorded['message'].removeprefix('CalmError: ')}")
    sys.exit(failure.exitcode)  # the first process has printed why
