"""Fits against scipy's regression and by coverage; crossings against the closed form."""

import math

import numpy as np
import pytest
from scipy import stats

from calm_core.study.power_law import PowerLaw, crossing, fit_power_law

FLOPS = [1e12 * 2.0**exponent for exponent in range(8)]


def law(score: float, exponent: float, noise: float = 0.0, seed: int = 0) -> PowerLaw:
    """Fitted to eight points of score * (FLOPs / 1e13)^exponent."""
    generator = np.random.default_rng(seed)
    scores = [score * (x / 1e13) ** exponent * math.exp(noise * generator.standard_normal()) for x in FLOPS]
    found = fit_power_law(FLOPS, scores, generator)
    assert found is not None
    return found


def test_exact_powers_come_back() -> None:
    found = law(2.0, 0.4)
    assert found.exponent == pytest.approx(0.4)
    assert math.exp(found.log_score(1e13).estimate) == pytest.approx(2.0)
    assert (found.smallest, found.largest, found.points) == (FLOPS[0], FLOPS[-1], 8)
    assert found.residual == pytest.approx(0, abs=1e-12)


def test_interval_is_that_of_regression() -> None:
    generator = np.random.default_rng(3)
    y = 0.4 * np.log(FLOPS) + 0.1 * generator.standard_normal(8)
    found = fit_power_law(FLOPS, list(np.exp(y)), generator)
    expected = stats.linregress(np.log(FLOPS), y)
    assert found is not None
    assert found.exponent == pytest.approx(expected.slope)
    half = stats.t.ppf(0.975, 6) * expected.stderr
    # 10,000 draws: the quantiles have a standard error of some 3 % of the half-width.
    assert found.exponent_interval.high - found.exponent == pytest.approx(half, rel=0.1)
    assert found.exponent - found.exponent_interval.low == pytest.approx(half, rel=0.1)


def test_intervals_cover() -> None:
    # Four points: where draws from a normal distribution, or a bootstrap, would cover some 85 %.
    trials, x = 600, FLOPS[:4]
    inside = {"exponent": 0, "line": 0}
    for trial in range(trials):
        generator = np.random.default_rng(trial)
        scores = [3.0 * (flops / 1e13) ** 0.4 * math.exp(0.1 * generator.standard_normal()) for flops in x]
        found = fit_power_law(x, scores, generator)
        assert found is not None
        exponent, line = found.exponent_interval, found.log_score(x[-1])
        inside["exponent"] += exponent.low <= 0.4 <= exponent.high
        inside["line"] += line.low <= math.log(3.0 * (x[-1] / 1e13) ** 0.4) <= line.high
    for covered in inside.values():
        assert covered / trials == pytest.approx(0.95, abs=0.025)


def test_two_points_are_no_fit() -> None:
    assert fit_power_law(FLOPS[:2], [1.0, 2.0], np.random.default_rng(0)) is None
    assert fit_power_law([1e12, 1e12, 2e12], [1.0, 1.1, 2.0], np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ((1.0, 0.6), (1.2, 0.5), "within"),  # log x = log 1e13 + log 1.2 / 0.1: 6.2e13
        ((1.0, 0.6), (1.5, 0.5), "beyond"),
        ((3.0, 0.6), (1.0, 0.5), "ahead"),
    ],
)
def test_crossing_has_the_closed_form(first: tuple[float, float], second: tuple[float, float], where: str) -> None:
    found = crossing(law(*first), law(*second))
    expected = 1e13 * (second[0] / first[0]) ** (1 / (first[1] - second[1]))
    assert found.flops.estimate == pytest.approx(expected, rel=1e-6)
    assert found.where == where


def test_crossing_with_a_charge_is_where_the_scores_are_equal() -> None:
    first, second, charge = law(1.0, 0.6), law(1.2, 0.4), 4e12
    found = crossing(first, second, charge).flops.estimate
    assert first.log_score(found - charge).estimate == pytest.approx(second.log_score(found).estimate, abs=1e-9)
    # A charge that does not matter changes nothing, though it is found by another way.
    without = crossing(first, second).flops.estimate
    assert crossing(first, second, 1.0).flops.estimate == pytest.approx(without, rel=1e-6)
    assert found > without


def test_a_smaller_exponent_never_stays_ahead() -> None:
    found = crossing(law(3.0, 0.4), law(1.0, 0.5))
    assert found.where == "never"
    assert math.isinf(found.flops.estimate)


def test_less_is_better_for_bits() -> None:
    first, second = law(3.2, -0.07), law(3.0, -0.05)
    found = crossing(first, second, higher_is_better=False)
    assert found.flops.estimate == pytest.approx(1e13 * (3.2 / 3.0) ** (1 / 0.02), rel=1e-6)
    assert crossing(second, first, higher_is_better=False).where == "never"


def test_an_open_difference_has_no_upper_end() -> None:
    found = crossing(law(1.0, 0.52, 0.1, 1), law(1.1, 0.5, 0.1, 2))
    assert math.isinf(found.flops.high)
    assert found.flops.low < found.flops.estimate


@pytest.mark.slow
def test_the_interval_of_a_crossing_covers() -> None:
    trials, inside, generator = 400, 0, np.random.default_rng(0)
    expected = 1e13 * 1.2**5
    for _ in range(trials):
        laws = []
        for score, exponent in ((1.0, 0.6), (1.2, 0.4)):
            noise = np.exp(0.05 * generator.standard_normal(8))
            scores = [score * (x / 1e13) ** exponent * one for x, one in zip(FLOPS, noise, strict=True)]
            laws.append(fit_power_law(FLOPS, scores, generator))
        assert laws[0] is not None
        assert laws[1] is not None
        flops = crossing(laws[0], laws[1]).flops
        inside += flops.low <= expected <= flops.high
    # Two lines, each with a variance of its own: 95 % or a little more (Behrens and Fisher's problem).
    assert 0.93 <= inside / trials <= 0.99
