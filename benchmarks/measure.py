"""How things are measured here: two of them in turns, several times, and the median of the ratios counts.

Machines are shared and noisy; what slows one of two alternating things slows the other as well. Memory is that of a
process of its own, where nothing else runs.
"""

import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROUNDS = 7

LOOKS_EVERY = 0.001
"""Seconds between two looks at the memory of a process."""


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


class Memory(NamedTuple):
    """Of a process, in bytes, without the pages of mapped files, which the system takes back when it needs them."""

    before: int
    """With all imported that its work needs."""
    highest: int

    @property
    def added(self) -> int:
        """What the work took, at most."""
        return self.highest - self.before


def peak_memory(work: Callable[..., object], *arguments: Any) -> Memory:
    """The memory of a fresh process that calls ``work(*arguments)``, looked at from here each millisecond.

    ``work`` is a function of a module, since the process imports it anew. Elsewhere than on Linux mapped files count.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worked, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        before = highest = receiver.recv()
        while not receiver.poll(LOOKS_EVERY):
            highest = max(highest, _own_bytes(process.pid) or 0)
        return Memory(before, max(highest, receiver.recv()))
    except EOFError:
        raise RuntimeError(f"{work.__module__}.{work.__name__} failed in the measured process") from None
    finally:
        process.join()


def _worked(sender: Any, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Tell this process's memory before and after ``work``."""

    def memory() -> int:
        unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes here, Linux KiB
        return _own_bytes(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    sender.send(memory())
    work(*arguments)
    sender.send(memory())


def _own_bytes(process: int | None) -> int | None:
    """Resident memory of ``process`` that is of no mapped file; None where /proc does not tell."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended, or this is not Linux
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
