"""Power laws of scores in FLOPs, with intervals, and where two of them cross; numpy alone.

Over two decades a straight line in logarithms is what eight points can bear: a third parameter, a floor that the score
nears, would be read off noise. So the fit is log score = a + b log FLOPs by least squares, and is used inside
the measured range or called an extrapolation.

Intervals come from draws of (a, b): the residual variance from its scaled inverse chi-squared distribution with n - 2
degrees of freedom, then the coefficients from their normal distribution. For a, b and the fitted line they are the t
intervals of regression, exact for normal residuals however few the points, where a bootstrap over eight points covers
too rarely; and whatever follows from two lines, a crossing for instance, follows from draws of both.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 10_000
FEWEST_POINTS = 3
"""Below it nothing is left to tell residuals by."""

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
    """Geometric mean of the FLOPs: there the two coefficients are uncorrelated."""
    draws: Floats
    """[draws, 2]: intercept and exponent."""
    smallest: float
    """FLOPs of the smallest point fitted."""
    largest: float
    points: int
    residual: float
    """Standard deviation of the residuals, in natural logarithms of the score."""

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


def fit_power_law(flops: list[float], scores: list[float], generator: np.random.Generator) -> PowerLaw | None:
    """The power law through positive ``scores`` at ``flops``; None for fewer than ``FEWEST_POINTS`` points.

    A score of 0 or less has no logarithm: leave out what cannot be told from 0 before.
    """
    if len(set(flops)) < FEWEST_POINTS:
        return None
    x, y = np.log(flops), np.log(scores)
    centre = x.mean()
    spread = float(((x - centre) ** 2).sum())
    exponent = float(((x - centre) * y).sum() / spread)
    intercept = float(y.mean())
    freedom = len(x) - 2
    squares = float(((y - intercept - exponent * (x - centre)) ** 2).sum())
    deviations = np.sqrt(squares / generator.chisquare(freedom, DRAWS))
    normal = generator.standard_normal((DRAWS, 2))
    draws = np.stack(
        [
            intercept + deviations * normal[:, 0] / np.sqrt(len(x)),
            exponent + deviations * normal[:, 1] / np.sqrt(spread),
        ],
        axis=1,
    )
    return PowerLaw(
        intercept,
        exponent,
        float(np.exp(centre)),
        draws,
        float(min(flops)),
        float(max(flops)),
        len(x),
        float(np.sqrt(squares / freedom)),
    )


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


def crossing(first: PowerLaw, second: PowerLaw, charge: float = 0.0, higher_is_better: bool = True) -> Crossing:
    """Where ``first`` overtakes ``second``, if a point of ``first`` costs ``charge`` FLOPs more than its fit counts.

    At x FLOPs in all the curves are a1 + b1 log(x - charge) and a2 + b2 log x. If b1 > b2 > 0 their difference rises
    with x, so they cross once, and without a charge at log x = (a2 - a1) / (b1 - b2); if not, the first never stays
    ahead.
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
    flops = interval(float(overtakes(*lines)[0]), overtakes(first.draws, second.draws))
    if np.isinf(flops.estimate):
        return Crossing(flops, "never")
    if flops.estimate < max(first.smallest + charge, second.smallest):
        return Crossing(flops, "ahead")
    return Crossing(flops, "within" if flops.estimate <= min(first.largest + charge, second.largest) else "beyond")
