"""The training curve: which steps a point stands for, and their means."""

import pytest
import torch

from calm_core.runtime.process_group import ALONE
from calm_core.training.curve import TrainingCurve


def curve_of(steps: int) -> TrainingCurve:
    return TrainingCurve(steps, [], {}, ALONE)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (3, [1, 2, 3]),
        (399, list(range(1, 400))),
        (400, list(range(2, 401, 2))),
        (1001, [*range(5, 1001, 5), 1001]),
    ],
)
def test_some_200_points_and_the_end(steps: int, expected: list[int]) -> None:
    curve = curve_of(steps)
    assert [done for done in range(1, steps + 1) if curve.is_due(done)] == expected


def test_points_are_means_over_their_steps() -> None:
    curve = curve_of(803)  # a point every 4 steps, and a last one of 3
    assert curve.first_loss is None
    for done in range(1, 804):
        curve.add({"loss": torch.tensor(float(done)), "twice": torch.tensor(2.0 * done)})
        if curve.is_due(done):
            middle = done - 1.5 if done % 4 == 0 else 802
            point = curve.close_point(done, {"observed": 0.5})
            assert point == {"loss": middle, "twice": 2 * middle, "observed": 0.5}
            assert curve.points[-1] == (done, point)
            assert curve.sums == {}
    assert len(curve.points) == 201
    assert curve.first_loss == 2.5


def test_a_curve_goes_on_from_its_points_and_sums() -> None:
    curve = curve_of(400)
    for loss in (1.0, 3.0, 10.0):
        curve.add({"loss": torch.tensor(loss)})
        if loss == 3:
            curve.close_point(2, {})
    resumed = TrainingCurve(400, curve.points, curve.sums, ALONE)
    resumed.add({"loss": torch.tensor(20.0)})
    resumed.close_point(4, {})
    assert resumed.points == [(2, {"loss": 2.0}), (4, {"loss": 15.0})]
    assert curve.points == [(2, {"loss": 2.0})]
    assert resumed.first_loss == 2.0
