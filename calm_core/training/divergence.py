"""Whether a training diverges: a loss or a gradient that is not finite, or a loss far above where it began.

Reading a value synchronises with the device that computes it. So the values of each step stay on the device and are
read together, at every point of the training curve and before a checkpoint is saved.
"""

from collections.abc import Callable, Iterable
from math import isfinite

import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.runtime.process_group import ALONE, ProcessGroup

LEAP = 10.0
"""How many times the loss of its first point a training's loss may reach.

The first point is about the loss of an untrained model, so ten times as much is beyond the fluctuations of any
objective here: a batch is broken, or the weights diverge.
"""


class Divergence:
    """Checks the training ``name``; ``describe_batch`` names, for messages, what a step trains on.

    ``saved`` is the number of steps after which the last checkpoint was written, 0 for none; the loop sets it. The
    checks are collectives over ``processes``, on means over them, so that all reach the same verdict.
    """

    def __init__(
        self, name: str, describe_batch: Callable[[int], str], saved: int = 0, processes: ProcessGroup = ALONE
    ) -> None:
        self._name, self._describe_batch, self._processes = name, describe_batch, processes
        self.saved = saved
        self._unseen: list[tuple[int, Tensor]] = []

    def observe(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Record loss and gradient norm, scalars, of step number ``step``, without synchronising."""
        self._unseen.append((step, torch.stack((loss.detach().float(), gradient_norm.detach().float()))))

    def require_none(self, first_loss: float | None) -> None:
        """Check all steps since the last call; ``first_loss`` is that of the curve's first point, None before it.

        Raises:
            CalmError: loss or gradient of a step is not finite, or its loss leapt; names the first such step.
        """
        if not self._unseen:
            return
        # A NaN of one process makes the mean NaN in all: all raise, and none is left waiting in the next collective.
        rows = self._processes.mean(torch.stack([values for _, values in self._unseen])).tolist()
        for (step, _), (loss, gradient_norm) in zip(self._unseen, rows, strict=True):
            if not isfinite(loss):
                self._stop(step, f"the loss is {loss}")
            if not isfinite(gradient_norm):
                self._stop(step, f"the norm of the gradient is {gradient_norm}")
            if first_loss is not None and loss > LEAP * abs(first_loss):
                self._stop(step, f"the loss leaps to {loss:.4g}, from {first_loss:.4g} at the beginning,")
        self._unseen = []

    def require_finite(self, tensors: Iterable[Tensor], done: int) -> None:
        """Raise CalmError, in all processes, if a tensor of the state after ``done`` steps is not finite in one."""
        # The gathered state is in the first process alone, so its verdict has to reach the others.
        (broken,) = self._processes.any_rank([not all(tensor.isfinite().all() for tensor in tensors)])
        if broken:
            self._stop(done - 1, "weights or the optimiser's state are no longer finite")

    def _stop(self, step: int, what: str) -> None:
        kept = f"the checkpoint after step {self.saved} is kept; " if self.saved else ""
        raise CalmError(
            f"{self._name}: {what} at step {step + 1} ({self._describe_batch(step)}); {kept}"
            "lower the learning rates or check that text"
        )
