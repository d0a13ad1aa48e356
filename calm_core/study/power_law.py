"""Power laws of scores in FLOPs, with intervals, and where two of them cross.

Over two decades a straight line in logarithms is what eight points can bear: a third parameter, a floor that the score
nears, would be read off noise. So the fit is score = exp(a + b log FLOPs), and is used inside the measured range or
called an extrapolation.

It is one of the scores themselves and not of their logarithms, by least squares weighted by what each point's own
interval says, so that all points count, those too that cannot be told from 0. To leave these out chooses points by
their outcome: of the small budgets of a noisy model the lucky ones stay, and the line is too flat. For a model whose
exponent is 0.8 and whose interval reaches 0 at four or five of eight budgets, the exponent would be 0.14 to 0.28 too
small, and its interval cover it in some 80 % of simulations; here it is within 0.01 by the median, and 96 to 97 %.
BrierLM is never below 0, so what a point is compared with is the mean of a normal score clamped at 0 (Tobin, 1958),
which is the line itself wherever the line is two deviations above 0.

Intervals come from draws of (a, b): Student's t of n - 2 degrees of freedom around the estimate, with the covariance
of the linearised problem, scaled by how far the points miss the line (Pearson's chi-squared). Where points are as
certain as one another, and clear of 0, they are the t intervals of regression on logarithms; whatever follows from two
lines, a crossing for instance, follows from draws of both.

What all points of a model have in common is in no residual: they are scored on the same text, and under one seed they
share their autoencoder, too. The text's part is added to the draws, as a shift of the whole line, normal with the
relative standard deviation of the most certain point. It widens the line and moves no exponent. Two models meet the
same text, and what moves both alike is counted here as if it moved each for itself: comparisons err towards what
cannot be told. The chance of a seed and of its autoencoder is in a point's interval, and so in the shift, only from
two seeds on.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import ndtr

Floats = NDArray[np.float64]

DRAWS = 10_000
FEWEST_POINTS = 3
"""Below it nothing is left to tell residuals by."""

NORMAL_95 = 1.96

LEAST_DEVIATION = 0.05
"""Of a score, as a share of it, added in quadrature to what its interval says: that is of held-out documents, and a
narrow one shall not decide the line alone. Where there are no intervals, all points weigh the same."""

BISECTIONS = 200
HORIZON = 80.0
"""Natural logarithms beyond the measured range within which a crossing is looked for."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval, whose ends may be infinite."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """score = exp(intercept) * (FLOPs / centre)^exponent, and draws from what the points leave open."""

    intercept: float
    exponent: float
    centre: float
    """Geometric mean of the FLOPs."""
    draws: Floats
    """[draws, 2]: intercept, with the shift that all points share, and exponent."""
    smallest: float
    """FLOPs of the smallest point fitted."""
    largest: float
    points: int
    residual: float
    """Standard deviation of the residuals as a share of the score, of a point of middling weight."""

    def log_score(self, flops: float) -> Interval:
        """Natural logarithm of the fitted score at ``flops``."""
        return interval(
            self.intercept + self.exponent * np.log(flops / self.centre), self.log_score_draws(np.array(flops))
        )

    def log_score_draws(self, flops: Floats) -> Floats:
        """The same of each draw, [draws] or broadcast with ``flops``."""
        return self.draws[:, 0] + self.draws[:, 1] * np.log(flops / self.centre)

    @property
    def exponent_interval(self) -> Interval:
        """The exponent with its 95 % interval."""
        return interval(self.exponent, self.draws[:, 1])


def fit_power_law(
    flops: Sequence[float], scores: Sequence[Interval], generator: np.random.Generator
) -> PowerLaw | None:
    """The power law through ``scores``, which are 0 or larger, at ``flops``.

    None for fewer than ``FEWEST_POINTS`` different FLOPs, for fewer than two scores above 0, which leave an exponent
    open, and where the least squares do not converge.
    """
    values = np.array([score.estimate for score in scores])
    above = values > 0
    if len(set(flops)) < FEWEST_POINTS or len({x for x, one in zip(flops, above, strict=True) if one}) < 2:
        return None
    deviations = _deviations(scores)
    centre = float(np.log(flops).mean())
    x = np.log(flops) - centre

    def expected(x: Floats, intercept: float, exponent: float) -> Floats:
        return _clamped(_power(x, intercept, exponent), deviations)[0]

    def slopes(x: Floats, intercept: float, exponent: float) -> Floats:
        line = _power(x, intercept, exponent)
        rising = line * ndtr(line / deviations)
        return np.stack([rising, rising * x], axis=1)

    # From where the scores above 0 put the line.
    exponent, intercept = np.polyfit(x[above], np.log(values[above]), 1, w=(values / deviations)[above])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            (intercept, exponent), covariance = curve_fit(
                expected, x, values, (intercept, exponent), deviations, absolute_sigma=True, jac=slopes
            )
    except (RuntimeError, OptimizeWarning):
        return None
    line = _power(x, intercept, exponent)
    means, variances = _clamped(line, deviations)
    # Of a clamped score the variance is smaller than of one that is not.
    freedom = len(x) - 2
    misfit = float(((values - means) ** 2 / variances).sum()) / freedom
    normal = generator.multivariate_normal((0, 0), misfit * covariance, DRAWS, method="eigh")
    draws = np.array([intercept, exponent]) + normal * np.sqrt(freedom / generator.chisquare(freedom, (DRAWS, 1)))
    draws[:, 0] += _shared_deviation(scores) * generator.standard_normal(DRAWS)
    return PowerLaw(
        float(intercept),
        float(exponent),
        float(np.exp(centre)),
        draws,
        float(min(flops)),
        float(max(flops)),
        len(x),
        float(np.sqrt(misfit / ((line / deviations) ** 2).mean())),
    )


def _power(x: Floats, intercept: float, exponent: float) -> Floats:
    # Bounded: on its way the search may come by anything.
    return np.exp(np.clip(intercept + exponent * x, -80, 80))


def _clamped(mean: Floats, deviation: Floats) -> tuple[Floats, Floats]:
    """Mean and variance of max(0, a normal variable of ``mean`` and ``deviation``)."""
    z = mean / deviation
    below = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    # In deviations, so that far from 0 nothing is lost by cancellation.
    first = z * ndtr(z) + below
    return deviation * first, deviation**2 * np.where(z > 8, 1.0, (z**2 + 1) * ndtr(z) + z * below - first**2)


def _deviations(scores: Sequence[Interval]) -> Floats:
    """Standard deviation of each of ``scores`` by its interval."""
    estimates, low, high = np.array(scores).T
    found = np.hypot((high - low) / (2 * NORMAL_95), LEAST_DEVIATION * estimates)
    clear = low > 0
    # An interval that ends at 0 hides a part of itself, and that of a score of 0 may hide all.
    least = np.median(found[clear]) if clear.any() else found.max()
    return np.where(clear, found, np.maximum((high - estimates) / NORMAL_95, least))


def _shared_deviation(scores: Sequence[Interval]) -> float:
    """Of log score, what all points share: that of the point whose interval is the narrowest in proportion."""
    shares = [(score.high - score.low) / (2 * NORMAL_95 * score.estimate) for score in scores if score.estimate > 0]
    return min(shares)


def interval(estimate: float, draws: Floats) -> Interval:
    """``estimate`` with the 2.5 and 97.5 % quantiles of ``draws``, which may hold infinities."""
    # By rank: interpolating between an infinity and a number gives NaN.
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(estimate), float(low), float(high))


class Crossing(NamedTuple):
    """The FLOPs from which on the first curve is ahead of the second for good; infinite where it never is."""

    flops: Interval
    where: Literal["ahead", "within", "beyond", "never"]
    """Below, inside or above the measured range, or not at all, by the estimate."""
    smallest: float
    """FLOPs of the smallest budget that both have."""
    largest: float
    """And of the largest."""
    gains: float
    """Share of the draws in which the first gains from scale at all."""
    gains_more: float
    """In which it gains more than the second."""
    ahead_throughout: float
    """In which it is ahead from the smallest budget that both have, for good."""
    ahead_at_the_end: float
    """In which it is ahead at ``largest``."""


def crossing(first: PowerLaw, second: PowerLaw, charge: float = 0.0, higher_is_better: bool = True) -> Crossing:
    """Where ``first`` overtakes ``second``, if a point of ``first`` costs ``charge`` FLOPs more than its fit counts.

    At x FLOPs in all the curves are a1 + b1 log(x - charge) and a2 + b2 log x. If b1 > b2 > 0 their difference rises
    with x, so they cross once, and without a charge at log x = (a2 - a1) / (b1 - b2); if not, the first never stays
    ahead. Where b1 is 0 or less nothing is looked for.
    """
    sign = 1.0 if higher_is_better else -1.0

    def overtakes(one: Floats, two: Floats) -> Floats:
        # Lines as [n, 2] of intercept and exponent, turned so that more is better.
        (a1, b1), (a2, b2) = sign * one.T, sign * two.T
        # Of log (x - charge), between which ends the crossing is looked for.
        low = np.full(len(a1), np.log(min(first.smallest, second.smallest)) - HORIZON)
        high = np.full(len(a1), np.log(max(first.largest, second.largest)) + HORIZON)
        for _ in range(BISECTIONS if charge else 0):
            middle = (low + high) / 2
            ahead = a1 + b1 * (middle - np.log(first.centre)) > a2 + b2 * (
                np.logaddexp(middle, np.log(charge)) - np.log(second.centre)
            )
            low, high = np.where(ahead, low, middle), np.where(ahead, middle, high)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if charge:
                found = np.exp(high) + charge
            else:
                starts = a2 - b2 * np.log(second.centre) - a1 + b1 * np.log(first.centre)
                found = np.exp(starts / (b1 - b2))
            return np.where((b1 > b2) & (b1 > 0), found, np.inf)

    lines = [np.array([[law.intercept, law.exponent]]) for law in (first, second)]
    draws = overtakes(first.draws, second.draws)
    flops = interval(float(overtakes(*lines)[0]), draws)
    smallest = max(first.smallest + charge, second.smallest)
    largest = min(first.largest + charge, second.largest)
    # What a charge leaves of the largest budget may be less than was ever measured.
    left = np.array(max(largest - charge, first.smallest))
    differences = sign * (first.log_score_draws(left) - second.log_score_draws(np.array(largest)))
    where: Literal["ahead", "within", "beyond", "never"]
    if np.isinf(flops.estimate):
        where = "never"
    elif flops.estimate < smallest:
        where = "ahead"
    else:
        where = "within" if flops.estimate <= largest else "beyond"
    return Crossing(
        flops,
        where,
        smallest,
        largest,
        float((sign * first.draws[:, 1] > 0).mean()),
        float((sign * first.draws[:, 1] > sign * second.draws[:, 1]).mean()),
        float((draws < smallest).mean()),
        float((differences > 0).mean()),
    )
