"""Turns in their order, and the memory of a process against what it is known to take."""

import pytest

from benchmarks.measure import Result, alternately, median_ratio, peak_memory
from tests import needs_linux

MEBIBYTE = 1 << 20


def test_turns_alternate_after_one_that_warms_up() -> None:
    order: list[str] = []
    assert len(alternately(lambda: order.append("a"), lambda: order.append("b"), rounds=2)) == 2
    assert order == ["a", "b"] * 3


def test_a_slow_round_does_not_move_the_median() -> None:
    assert median_ratio([(2.0, 1.0), (60.0, 1.0), (4.0, 2.0)]) == 2


@pytest.mark.parametrize(
    ("comparison", "goal", "met"), [(">=", 2, True), (">=", 3, False), ("<=", 2, True), ("<", 2, False), ("<", 3, True)]
)
def test_a_goal_is_met(comparison: str, goal: float, met: bool) -> None:
    assert Result("a", "b", 2.0, "times", comparison, goal, {}).met is met  # type: ignore[arg-type]


@needs_linux
def test_memory_is_that_of_the_process_alone() -> None:
    bytearray(b"\1") * (256 * MEBIBYTE)  # a parent that was larger once
    assert peak_memory(_fill, 64 * MEBIBYTE).added == pytest.approx(64 * MEBIBYTE, rel=0.1)


def test_what_fails_in_the_process_fails_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"test_measure\._fill failed"):
        peak_memory(_fill, -1)
    assert "ValueError" in capfd.readouterr().err


def _fill(size: int) -> None:
    if size < 0:
        raise ValueError(size)
    bytearray(b"\1") * size
