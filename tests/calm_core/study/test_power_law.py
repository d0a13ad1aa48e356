"""Fits against scipy's regression, scipy's normal distribution and by coverage; crossings against the closed form."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from calm_core.study.power_law import Interval, PowerLaw, _clamped, _shared_deviation, crossing, fit_power_law

FLOPS = [1e12 * 2.0**exponent for exponent in range(8)]


def exact(scores: Sequence[float]) -> list[Interval]:
    """Scores without intervals of their own."""
    return [Interval(score, score, score) for score in scores]


def law(score: float, exponent: float, noise: float = 0.0, seed: int = 0) -> PowerLaw:
    """Fitted to eight points of score * (FLOPs / 1e13)^exponent."""
    generator = np.random.default_rng(seed)
    scores = [score * (x / 1e13) ** exponent * math.exp(noise * generator.standard_normal()) for x in FLOPS]
    found = fit_power_law(FLOPS, exact(scores), generator)
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
    y = 0.4 * np.log(FLOPS) + 0.01 * generator.standard_normal(8)
    found = fit_power_law(FLOPS, exact(list(np.exp(y))), generator)
    expected = stats.linregress(np.log(FLOPS), y)
    assert found is not None
    assert found.exponent == pytest.approx(expected.slope, abs=0.1 * expected.stderr)
    half = stats.t.ppf(0.975, 6) * expected.stderr
    # 10,000 draws: the quantiles have a standard error of some 3 % of the half-width.
    assert found.exponent_interval.high - found.exponent == pytest.approx(half, rel=0.1)
    assert found.exponent - found.exponent_interval.low == pytest.approx(half, rel=0.1)
    assert found.residual == pytest.approx(
        np.sqrt(((y - expected.intercept - expected.slope * np.log(FLOPS)) ** 2).sum() / 6), rel=0.05
    )


def test_certain_points_weigh_more() -> None:
    # The last two are off by a fifth, and say so.
    scores = exact([(x / 1e13) ** 0.4 for x in FLOPS])
    off = [Interval(1.2 * one.estimate, 0.01 * one.estimate, 3 * one.estimate) for one in scores[6:]]
    found = fit_power_law(FLOPS, scores[:6] + off, np.random.default_rng(0))
    assert found is not None
    assert found.exponent == pytest.approx(0.4, abs=0.002)


def coverage(
    scores: Callable[[np.random.Generator], list[Interval]],
    exponent: float,
    end: float,
    flops: list[float],
    trials: int,
) -> tuple[float, float, float]:
    """Share of simulations in which the exponent and the line at the last budget are covered, and the median bias."""
    inside, biases = np.zeros(2), []
    for trial in range(trials):
        generator = np.random.default_rng(trial)
        found = fit_power_law(flops, scores(generator), generator)
        assert found is not None
        slope, line = found.exponent_interval, found.log_score(flops[-1])
        inside += [slope.low <= exponent <= slope.high, line.low <= math.log(end) <= line.high]
        biases.append(found.exponent - exponent)
    return (*(inside / trials), float(np.median(biases)))


def test_intervals_cover() -> None:
    # Four points: where draws from a normal distribution, or a bootstrap, would cover some 85 %.
    x = np.array(FLOPS[:4])

    def scores(generator: np.random.Generator) -> list[Interval]:
        return exact(list(3.0 * (x / x[-1]) ** 0.4 * np.exp(0.1 * generator.standard_normal(4))))

    covered = coverage(scores, 0.4, 3.0, list(x), 500)
    assert covered[:2] == pytest.approx((0.95, 0.95), abs=0.025)


def test_what_all_points_share_moves_the_line_and_no_exponent() -> None:
    """A text that moves all scores by the same tenth or so, residuals of a hundredth that know nothing of it."""
    x = np.array(FLOPS)

    def scores(generator: np.random.Generator) -> list[Interval]:
        seen = (
            3.0 * (x / x[-1]) ** 0.4 * np.exp(0.1 * generator.standard_normal() + 0.01 * generator.standard_normal(8))
        )
        # Small budgets are less certain.
        widths = 1.96 * np.linspace(0.2, 0.1, 8)
        return [Interval(one, one * (1 - width), one * (1 + width)) for one, width in zip(seen, widths, strict=True)]

    exponent, line, _ = coverage(scores, 0.4, 3.0, FLOPS, 500)
    assert exponent == pytest.approx(0.95, abs=0.03)
    assert line == pytest.approx(0.95, abs=0.025)
    found = fit_power_law(FLOPS, scores(np.random.default_rng(0)), np.random.default_rng(0))
    assert found is not None
    assert found.draws[:, 0].std() == pytest.approx(0.1, rel=0.1)
    assert found.draws[:, 1].std() < 0.01
    # Also where no interval is clear of 0.
    assert _shared_deviation([Interval(0.0, 0.0, 0.1), Interval(1.0, 0.0, 2.0)]) == pytest.approx(1 / 1.96)


@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_points_that_may_be_0_count(noise: float) -> None:
    """A BrierLM from 0.03 to 1.5, clamped at 0, under noise that hides the smaller half of the budgets."""
    x = np.array(FLOPS)

    def scores(generator: np.random.Generator) -> list[Interval]:
        seen = 1.5 * (x / x[-1]) ** 0.8 + noise * generator.standard_normal(8)
        ends = [np.maximum(seen + 1.96 * side * noise, 0.0) for side in (0, -1, 1)]
        return [Interval(*one) for one in zip(*ends, strict=True)]

    exponent, line, bias = coverage(scores, 0.8, 1.5, FLOPS, 500)
    # Without those whose interval reaches 0 the exponent is 0.14 and 0.28 too small, and covered in some 80 %.
    assert exponent == pytest.approx(0.95, abs=0.025)
    # The line has room for a text that moved all points, and here none did.
    assert line > 0.95
    assert abs(bias) < 0.02


def test_a_clamped_score_has_the_mean_and_variance_of_its_distribution() -> None:
    z = np.array([0.001, 0.5, 2.0, 7.0, 9.0, 1e4])
    means, variances = _clamped(0.3 * z, np.full(6, 0.3))
    for one, mean, variance in zip(z[:4], means, variances, strict=False):
        moments = [stats.norm(0.3 * one, 0.3).expect(lambda value, power=power: value**power, 0.0) for power in (1, 2)]
        assert mean == pytest.approx(moments[0], rel=1e-6)
        assert variance == pytest.approx(moments[1] - moments[0] ** 2, rel=1e-6)
    assert means[4:] == pytest.approx(0.3 * z[4:])
    assert variances[4:] == pytest.approx(0.09)


def test_a_score_of_0_is_evidence() -> None:
    scores = exact([1.0, 2.0, 4.0])
    lowest = Interval(0.0, 0.0, 0.0)
    flat, steep = (
        fit_power_law(FLOPS[:5], [first, first, *scores], np.random.default_rng(0)) for first in (scores[0], lowest)
    )
    assert flat is not None
    assert steep is not None
    assert (steep.points, steep.smallest) == (5, FLOPS[0])
    assert steep.exponent > flat.exponent + 0.2


def test_what_is_no_fit() -> None:
    generator = np.random.default_rng(0)
    assert fit_power_law(FLOPS[:2], exact([1.0, 2.0]), generator) is None
    assert fit_power_law([1e12, 1e12, 2e12], exact([1.0, 1.1, 2.0]), generator) is None
    assert fit_power_law(FLOPS[:4], exact([0.0] * 4), generator) is None
    # Any exponent that is large enough.
    assert fit_power_law(FLOPS[:4], exact([0.0, 0.0, 0.0, 1.0]), generator) is None


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


def test_shares_of_draws() -> None:
    # Far apart all draws agree; of two models alike half of them say either.
    sure = crossing(law(3.0, 0.6, 0.05, 1), law(1.0, 0.4, 0.05, 2), 1e11)
    assert (sure.gains, sure.gains_more, sure.ahead_throughout, sure.ahead_at_the_end) == (1.0, 1.0, 1.0, 1.0)
    assert (sure.smallest, sure.largest) == (FLOPS[0] + 1e11, FLOPS[-1])
    other = crossing(law(1.0, 0.4, 0.05, 2), law(3.0, 0.6, 0.05, 1))
    assert (other.gains_more, other.ahead_throughout, other.ahead_at_the_end) == (0.0, 0.0, 0.0)
    same = [
        fit_power_law(
            FLOPS, [Interval(x / 1e13, 0.9 * x / 1e13, 1.1 * x / 1e13) for x in FLOPS], np.random.default_rng(seed)
        )
        for seed in (1, 2)
    ]
    assert same[0] is not None
    assert same[1] is not None
    assert crossing(same[0], same[1]).ahead_at_the_end == pytest.approx(0.5, abs=0.05)
    inside = crossing(law(1.0, 0.6), law(1.2, 0.5))
    assert (inside.ahead_throughout, inside.ahead_at_the_end) == (0.0, 1.0)
    falling = crossing(law(1.0, -0.1, 0.02, 1), law(2.0, -0.4, 0.02, 2))
    assert (falling.where, falling.gains, falling.gains_more) == ("never", 0.0, 1.0)
    assert crossing(law(1.0, -0.1, 0.02, 1), law(2.0, -0.4, 0.02, 2), higher_is_better=False).gains == 1.0


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
            laws.append(fit_power_law(FLOPS, exact(scores), generator))
        assert laws[0] is not None
        assert laws[1] is not None
        flops = crossing(laws[0], laws[1]).flops
        inside += flops.low <= expected <= flops.high
    # Two lines, each with a variance of its own: 95 % or a little more (Behrens and Fisher's problem).
    assert 0.93 <= inside / trials <= 0.99
