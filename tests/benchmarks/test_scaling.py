"""Fits against known power laws and scipy, turns in their order, and every kind of point once, small."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks.scaling import curves_of, fit, in_turns, plot, table
from benchmarks.scaling_points import (
    CONTEXT_AXIS,
    CORPUS_AXIS,
    PATCH_AXIS,
    WIDTH_AXIS,
    Point,
    choosing_points,
    corpus_points,
    model_points,
)
from calm_core.params import Params
from calm_core.presets import load_preset
from tests import ROOT


@pytest.fixture()
def smoke(monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(ROOT)
    return load_preset("smoke")


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.37, 2.0])
def test_a_power_law_is_recovered(exponent: float) -> None:
    x = [64, 128, 256, 1024]
    found = fit(x, [3e-6 * value**exponent for value in x])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-7)


def test_a_noisy_one_is_fitted_as_scipy_does() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    y = 5 * x**0.8 * np.exp(np.random.default_rng(0).normal(0, 0.2, len(x)))
    expected = scipy.stats.linregress(np.log(x), np.log(y))
    found = fit(x.tolist(), y.tolist())
    assert found == pytest.approx((expected.slope, expected.stderr))


def test_points_take_turns_and_the_first_round_only_warms_up() -> None:
    order: list[str] = []
    times = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 6.0, 4.0, 5.0])}

    def measured(name: str) -> float:
        order.append(name)
        return next(times[name])

    points = [Point("x", name, 1, lambda name=name: measured(name)) for name in times]
    assert in_turns(points, rounds=3) == [2.0, 5.0]
    assert order == ["a", "b"] * 4


def test_curves_are_fitted_apart_and_shown() -> None:
    points = [
        Point(axis, curve, x, lambda: 0.0, x**1.5 if curve == "CALM, training" else None)
        for axis in ("context", "K", "width", CORPUS_AXIS)
        for x in (1, 2, 4)
        for curve in ("CALM, training", "encode")
    ]
    seconds = [1e-6 * point.x ** (2 if point.curve == "encode" else 1) for point in points]
    rows = curves_of(points, seconds)
    assert len(rows) == 8
    assert rows[0]["x"] == [1, 2, 4]
    assert [row["exponent"] for row in rows[:2]] == pytest.approx([1, 2])
    assert rows[0]["flops_exponent"] == pytest.approx(1.5)
    assert rows[1]["flops_exponent"] is None
    assert "| context | CALM, training | 1: 1, 2: 2, 4: 4 | 1.00 ± 0.00 | 1.50 |" in table(rows)
    assert plot(rows).count("CALM, training: 1.00") == 4


@pytest.mark.parametrize(
    ("axis", "places", "curves"), [(CONTEXT_AXIS, (64, 128), 4), (PATCH_AXIS, (1, 8), 2), (WIDTH_AXIS, (32, 64), 4)]
)
def test_models_are_measured(smoke: Params, axis: str, places: tuple[int, int], curves: int) -> None:
    points = list(model_points(smoke, axis, places))
    assert len(points) == curves * len(places)
    assert all(point.seconds() > 0 for point in points)
    for first, last in zip(points[:curves], points[curves:], strict=True):
        assert first.flops and last.flops
        assert (first.flops > last.flops) if axis == PATCH_AXIS else (first.flops < last.flops)


def test_a_corpus_is_measured(smoke: Params, tmp_path: Path) -> None:
    points = [*corpus_points(smoke, tmp_path, (200, 400)), *choosing_points([10])]
    assert [point.curve for point in points[:3]] == ["tokenise", "encode", "reading batches"]
    assert points[3].x == pytest.approx(2 * points[0].x, rel=0.1)
    assert points[-1].x == 10 * 256
    assert all(point.seconds() > 0 for point in points)
