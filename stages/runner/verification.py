"""Inputs are verified once, by the first process of a stage: hashing a large corpus takes as long as reading it."""

import contextlib
from collections.abc import Callable

from calm_core.runtime.process_group import ProcessGroup
from stages.runner.launch import FirstFailedError


def verify_once(processes: ProcessGroup, verify: Callable[[], None]) -> None:
    """Have the first of ``processes`` run ``verify`` while the others wait.

    What that raises is raised in the first process; in the others, once the first has left, FirstFailedError.
    """
    error: Exception | None = None
    if processes.is_first:
        try:
            verify()
        except Exception as found:
            error = found
    intact = processes.broadcast_object(error is None)
    if error is not None:
        raise error
    if not intact:
        # The launcher stops all as soon as one ends, and the first is to tell why before. This collective fails when
        # it leaves the group, on its way out.
        with contextlib.suppress(RuntimeError):
            processes.any_rank([False])
        raise FirstFailedError
