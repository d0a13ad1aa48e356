"""The time of a step, by a clock that the test sets."""

import pytest

from stages.runner import step_timer
from stages.runner.step_timer import StepTimer


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(step_timer.time, "monotonic", lambda: now[0])
    return now


def test_a_step_takes_what_lies_between_points_without_what_is_written(clock: list[float]) -> None:
    timer = StepTimer()
    for step, seconds, written in ((1, 9.0, 4.0), (2, 2.0, 5.0), (4, 6.0, 0.0), (7, 3.0, 1.0)):
        clock[0] += seconds
        timer.point(step)
        with timer.stopped():
            clock[0] += written
    # 2 seconds for a step, then 6 for two, then 3 for three; the first has no beginning.
    assert timer.step_seconds == 2.0


def test_one_point_tells_nothing(clock: list[float]) -> None:
    timer = StepTimer()
    with timer.stopped():
        clock[0] += 1
    timer.point(1)
    assert timer.step_seconds is None


def test_points_of_an_earlier_process_do_not_count(clock: list[float]) -> None:
    timer = StepTimer()
    timer.resumes_after(3)
    for step in (1, 2, 3):
        timer.point(step)
    for step in (4, 5):
        clock[0] += 7
        timer.point(step)
    assert timer.step_seconds == 7.0
