"""The training curve: means of the logged scalars over the steps since the last point, some 200 points a training."""

from collections.abc import Mapping

from torch import Tensor

from calm_core.runtime.process_group import ProcessGroup
from calm_core.training.checkpoints import Points

LOGGED_POINTS = 200
"""How many points a training curve has, roughly."""


class TrainingCurve:
    """``points`` so far, and ``sums`` of each scalar since the last of them; both are part of a checkpoint."""

    def __init__(self, steps: int, points: Points, sums: Mapping[str, Tensor], processes: ProcessGroup) -> None:
        self._steps, self._every, self._processes = steps, max(1, steps // LOGGED_POINTS), processes
        self.points, self.sums = list(points), dict(sums)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the scalars of one step; waits for no device."""
        for name, value in values.items():
            # A sum on the device: .item() here would make every step wait for the device.
            self.sums[name] = self.sums.get(name, 0) + value

    def is_due(self, done: int) -> bool:
        """Whether a point is due after ``done`` steps."""
        return done % self._every == 0 or done == self._steps

    def close_point(self, done: int, observed: Mapping[str, float]) -> dict[str, float]:
        """End the point after ``done`` steps: the means over its steps and over the processes, beside ``observed``."""
        # The last point may close after fewer steps than the others.
        steps = (done - 1) % self._every + 1
        means = {name: total.item() / steps for name, total in self.mean_sums().items()}
        self.points.append((done, {**means, **observed}))
        self.sums = {}
        return self.points[-1][1]

    def mean_sums(self) -> dict[str, Tensor]:
        """``sums``, as means over the processes; a collective."""
        # Replaced by their means, which a later mean leaves as they are: a checkpoint between two points does not
        # change the next point, and any number of processes can resume from it.
        self.sums = {name: self._processes.mean(total) for name, total in self.sums.items()}
        return self.sums

    @property
    def first_loss(self) -> float | None:
        """The loss of the first point, None before it."""
        return self.points[0][1]["loss"] if self.points else None
