"""How long a step of a training takes: between points of its curve, without what is written in between."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Hears of points of the training curve in their order, those before a resumed training's first step included."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds: list[float] = []
        self._first = 0

    def resumes_after(self, step: int) -> None:
        """Points up to ``step`` are those of an earlier process, told again."""
        self._first = step

    def point(self, step: int) -> None:
        """``step`` steps are done, and a device has done what it was given."""
        if step <= self._first:
            return
        now = time.monotonic()
        if self._last is not None:
            since_step, since = self._last
            self._seconds.append((now - since) / (step - since_step))
        self._last = step, now

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What the block does is no part of a step."""
        started = time.monotonic()
        yield
        if self._last is not None:
            step, since = self._last
            self._last = step, since + time.monotonic() - started

    @property
    def step_seconds(self) -> float | None:
        """The median between two points; None before there are two."""
        return statistics.median(self._seconds) if self._seconds else None
