"""What the tests of bad input share: how many examples they try, and what a user may get to see."""

import os
import platform
import re
import resource
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from calm_core.errors import CalmError

TIMES = int(os.environ.get("BAD_INPUT_TIMES", "1"))
"""A longer exploration: BAD_INPUT_TIMES=10 tries ten times as many examples, other ones than the usual."""

LONGEST_LINE = 5000


def tries(examples: int) -> settings:
    """Settings that try ``examples`` examples, the same ones each time."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def complaint(act: Callable[[], Any]) -> str | None:
    """The line in which ``act`` is refused, None if it is not; anything but a CalmError is an error of the project."""
    try:
        with bounded():
            act()
    except CalmError as error:
        line = str(error)
        assert_one_line(line)
        return line
    return None


@contextmanager
def bounded(memory: int = 1 << 30, seconds: float = 20) -> Iterator[None]:
    """What the block does fails if it takes so many ``seconds``, or on Linux ``memory`` bytes beside those in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def hangs(number: int, frame: Any) -> NoReturn:
        pytest.fail(f"still at work after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if platform.system() == "Linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        if platform.system() == "Linux":
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_one_line(line: str) -> None:
    """``line`` is told in one line, of a length that can be read, that drives no terminal."""
    assert line.strip()
    assert len(line) < LONGEST_LINE
    assert len(line.splitlines()) == 1
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in line)
    assert not re.search(r"Traceback|File \".*\", line", line)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
"""Any script, emoji and control characters; all that UTF-8 can hold."""

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 10**9, 2**31, 2**63, 10**30, -(10**400)])
    | st.floats()
    | TEXTS
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.integers() | st.none() | st.floats(), inner, max_size=3)
    ),
    max_leaves=8,
)
"""Any plain value that YAML can hold."""


class Content(bytes):
    """Bytes that Hypothesis, which notes down each example, need not print whole."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes, {self[:60]!r}..."


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` cut off, with bits flipped, with bytes written over, put in or left out; never as it was."""
    position = st.integers(0, max(0, len(content) - 1))

    def flip(bits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, bit in bits:
            changed[place] ^= 1 << bit
        return bytes(changed)

    def splice(place: int, left_out: int, put_in: bytes) -> bytes:
        return content[:place] + put_in + content[place + left_out :]

    return (
        st.one_of(
            position.map(lambda length: content[:length]),
            st.lists(st.tuples(position, st.integers(0, 7)), min_size=1, max_size=4).map(flip),
            st.builds(splice, position, st.integers(0, 16), st.binary(max_size=16)),
            st.binary(min_size=1, max_size=64).map(lambda tail: content + tail),
        )
        .filter(lambda changed: changed != content)
        .map(Content)
    )
