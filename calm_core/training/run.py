"""The run around a training: where its curve, checkpoints and intermediate models go, and which processes share it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calm_core.runtime.process_group import ALONE, ProcessGroup
from calm_core.training.checkpoints import CheckpointStore


def _ignore(*arguments: Any) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """By default nothing is written and this process is the only one.

    The first process alone logs, keeps models and has checkpoints.
    """

    log: Callable[[int, Mapping[str, float]], None] = _ignore
    """Receives the number of steps done and the values of a point of the training curve."""
    keep: Callable[[int, Any], None] = _ignore
    """Receives the number of steps done and the model, after each of the steps ``kept_after``."""
    kept_after: frozenset[int] = frozenset()
    """The same in all processes, since gathering the model is a collective."""
    checkpoints: CheckpointStore | None = None
    """Where the training resumes from and saves to; None in a run that cannot be resumed."""
    processes: ProcessGroup = ALONE

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.processes.is_first


def spread_steps(steps: int, models: int) -> frozenset[int]:
    """After which of ``steps`` steps ``models`` models are kept: evenly spread, the end included."""
    # Rounded down; the last is exactly ``steps``.
    return frozenset(steps * (index + 1) // models for index in range(models))
