"""How things are measured here: two of them in turns, several times, and the median of the ratios counts.

Machines are shared and noisy; what slows one of two alternating things slows the other as well. Memory is measured in a
process of its own, whose high-water mark belongs to the one thing that ran in it.
"""

import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROUNDS = 7

_FIELDS = ("VmHWM", "RssFile")
"""Of /proc/self/status: the most that was resident, and what is of mapped files."""


class Result(NamedTuple):
    """One line of the table: ``value`` beside its goal, and everything that a reader may want to check it by."""

    name: str
    yardstick: str
    value: float
    unit: str
    """What ``value`` is in: "of the matrix rate", "times as fast", "s", ..."""
    comparison: Literal[">=", "<=", "<"]
    goal: float
    details: dict[str, Any]
    """Plain numbers and text for results/benchmarks.json: single ratios, seconds, sizes."""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        if self.comparison == ">=":
            return self.value >= self.goal
        return self.value <= self.goal if self.comparison == "<=" else self.value < self.goal


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternately(
    first: Callable[[], object], second: Callable[[], object], rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """Seconds of both, one pair a round, after a round that warms up."""
    first()
    second()
    return [(seconds_of(first), seconds_of(second)) for _ in range(rounds)]


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Median over rounds of seconds of the first over seconds of the second."""
    return statistics.median(first / second for first, second in pairs)


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median seconds of each."""
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs)


def peak_bytes(work: Callable[..., object], *arguments: Any) -> int:
    """By how many bytes ``work(*arguments)`` raised the resident memory of a fresh process, at its highest.

    ``work`` is a function of a module, since the process imports it anew; what it imports at its module's top is not
    counted. Nor are, on Linux, pages of mapped files, which the system takes back when it needs them; a mapping
    that is made early in ``work`` must be part of what it returns, or it is gone before it can be told.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__module__}.{work.__name__} failed in the measured process") from None
    finally:
        process.join()


class _Memory(NamedTuple):
    """Of this process, in bytes."""

    highest: int
    of_files: int


def _peak(sender: Any, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    before = _memory()
    result = work(*arguments)
    after = _memory()
    sender.send((after.highest - after.of_files) - (before.highest - before.of_files))
    del result


def _memory() -> _Memory:
    # The kernel hands ru_maxrss on from the parent, which would hide all that is smaller than the parent was; VmHWM
    # belongs to this process alone.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return _Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0)
    return _Memory(*(int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024 for name in _FIELDS))
