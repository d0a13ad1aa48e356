"""A stage in several processes of this machine: torchrun's agent starts them, watches them and ends them together.

`torchrun --nproc-per-node 4 -m stages.train_calm` does the same by hand, on several machines too, and its
--max-restarts goes on from the last checkpoint when a process dies.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from calm_core.errors import CalmError

LOST_CONTACT = "lost contact with another of its processes"
"""What a process tells that ended because another one did."""


def launch(name: str, processes: int) -> None:
    """Run the stage ``name`` in ``processes`` processes until all are done.

    When one of them fails the others are ended too. Then this process ends as ``running.run_stage`` says, after a line
    about the one that was the cause unless that one has told it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.set_wakeup_fd(-1)  # the agent handles signals: it passes them on and waits for the others
    logging.disable(logging.ERROR)  # and would tell all that follows in a page of its own
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{name}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", f"stages.{name}")
    except ChildFailedError as failed:
        _tell(name, processes, failed)
    except SignalException as stopped:
        print(f"{name}: stopped by {stopped.sigval.name}; `dvc repro` goes on", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.sigval)


def leave_to_launcher(line: str) -> None:
    """Have torchrun know why this process, which is not the first, ends; without torchrun tell it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(CalmError(line))
    else:
        print(line, file=sys.stderr, flush=True)


def lost_contact(error: Exception) -> bool:
    """Whether ``error`` came of another process that is gone."""
    text = f"{type(error).__name__} {error}"
    return any(sign in text for sign in ("DistError", "DistBackendError", "DistNetworkError", "gloo", "NCCL"))


def end_with_parent() -> None:
    """From now on the end of the launcher, were it by SIGKILL, ends this process within a second."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tell(name: str, processes: int, failed: "ChildFailedError") -> NoReturn:  # type: ignore[name-defined]  # noqa: F821
    # One that was killed comes before those that failed, and those that lost contact because of it come last.
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
    sys.exit(failure.exitcode)  # the first process has told
