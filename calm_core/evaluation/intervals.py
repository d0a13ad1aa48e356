"""BrierLM over seeds and documents together: its interval, and that of the difference of two models.

A score is uncertain twice: other documents would give another, and so would another seed of the trainings. Both are
drawn at random, and each document meets each seed, so the two variances are estimated apart and added:

- of documents, by a bootstrap that draws whole documents, since positions of one are not independent, or whole groups
  of them where a frame names groups: the split drew services, not documents, and those of one service are alike. The
  draws are the same for every seed and, of a difference, for both models: what makes a text easy for all cancels;
- of seeds, by the variance of their scores over their number; of a difference, the sum of both models'.

The interval is +- t standard errors, where the degrees of freedom are those of Welch and Satterthwaite: three seeds
know little of their own variance, and so do thirteen groups of which one has a third of the text; of these there are
as many as Kish's effective number, less one. Percentiles of a bootstrap that draws seeds as well cover too seldom with
so few (docs/method.md has both coverages, by simulation). With one seed the interval is over documents alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from calm_core.evaluation.brier import GROUP, SCORES, brierlm

RESAMPLED_AT_ONCE = 1 << 16
"""Groups of a bootstrap's draws that are in memory together."""

CONFIDENCE = 0.95


class BrierLM(NamedTuple):
    """BrierLM and what it is made of; every file of results that has it names and orders these fields so."""

    brierlm: float
    """The mean over seeds."""
    brierlm_ci95: list[float] | None
    """None of one seed and one group, which say nothing of others."""
    brier: list[float]
    """Brier-1 to Brier-4, averaged over positions, then over seeds."""
    positions: int
    documents: int
    groups: int
    """What is drawn: groups of documents, or the documents where no groups are named."""


class Difference(NamedTuple):
    """How much BrierLM of one model is above another's, on the same text."""

    difference: float
    difference_ci95: list[float] | None
    p: float | None
    """Of a difference of this size, of either sign, where there is none."""


def estimate_brierlm(seeds: Sequence[pl.DataFrame], resamples: int, generator: torch.Generator) -> BrierLM:
    """BrierLM of one model, trained under one seed or several: a ``brier.per_document`` frame of each.

    Positions are averaged first, then comes the geometric mean, in each of ``resamples`` draws of texts, too. A score
    of 0 has an upper end all the same: the score of the upper ends of Brier-1 to Brier-4.
    """
    sums = _aligned([seeds])[0]
    scores = brierlm(_mean_scores(sums))
    drawn = _resampled([sums], resamples, generator)[0]
    resampled = brierlm(drawn).mean(dim=0)
    mean = scores.mean().item()
    counts = sums[0, :, -1]
    interval = _interval(mean, [*_of_seeds(scores), *_of_text(resampled, counts)])
    if interval and not mean:
        # All that chance could have made positive was cut off at 0, and its spread with it.
        ends = [
            _interval(brier.mean().item(), [*_of_seeds(brier), *_of_text(of_draws.mean(dim=0), counts)])
            for brier, of_draws in zip(_mean_scores(sums).unbind(-1), drawn.unbind(-1), strict=True)
        ]
        interval = [0.0, brierlm(torch.tensor([high for _, high in filter(None, ends)])).item()]
    return BrierLM(
        mean,
        interval and [max(0.0, interval[0]), interval[1]],  # no score is below
        _mean_scores(sums).mean(dim=0).tolist(),
        int(counts.sum().item()),
        seeds[0].filter(pl.col("positions") > 0)["document"].n_unique(),
        int((counts > 0).sum().item()),
    )


def estimate_difference(
    first: Sequence[pl.DataFrame], second: Sequence[pl.DataFrame], resamples: int, generator: torch.Generator
) -> Difference:
    """BrierLM of ``first`` minus that of ``second``: frames of one text, one a seed, as many seeds as each has.

    A document that only one of the models has positions in counts there alone.
    """
    models = _aligned([first, second])
    scores = [brierlm(_mean_scores(sums)) for sums in models]
    difference = (scores[0].mean() - scores[1].mean()).item()
    # Drawn together, though the numbers of seeds may differ: the same documents for all.
    first_drawn, second_drawn = (brierlm(drawn).mean(dim=0) for drawn in _resampled(models, resamples, generator))
    of_text = _of_text(first_drawn - second_drawn, models[0][0, :, -1] + models[1][0, :, -1])
    variances = [*_of_seeds(scores[0]), *_of_seeds(scores[1]), *of_text]
    interval = _interval(difference, variances)
    if interval is None:
        return Difference(difference, None, None)
    error, freedom = _standard_error(variances)
    # Models that agree on every text leave nothing to tell apart; any other difference then is certain.
    p = float(2 * stdtr(freedom, -abs(difference) / error)) if error else float(difference == 0)
    return Difference(difference, interval, p)


def effective_number(sizes: Tensor) -> float:
    """How many groups of one size know as much as those of ``sizes`` [groups] (Kish, 1965)."""
    return float(sizes.sum() ** 2 / sizes.square().sum())


def half_width(standard_error: float, freedom: float) -> float:
    """Of the interval of a mean whose ``standard_error`` has so many degrees of freedom, by Student's t."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * standard_error


def _aligned(models: Sequence[Sequence[pl.DataFrame]]) -> list[Tensor]:
    """Sums of scores and numbers of positions of the same groups, [seeds, groups, 5] float64 of each model."""
    drawn = GROUP if all(GROUP in frame.columns for seeds in models for frame in seeds) else "document"
    sums = [*SCORES, "positions"]
    every = pl.concat([frame.select(drawn) for seeds in models for frame in seeds]).unique().sort(drawn)

    def of(frame: pl.DataFrame) -> Tensor:
        # In the order of the rows: polars otherwise adds up what its threads have done as they finish, and two runs
        # differ in the last digit.
        grouped = frame.group_by(drawn, maintain_order=True).agg(pl.col(sums).sum())
        whole = every.join(grouped, on=drawn, how="left", maintain_order="left").fill_null(0)
        return torch.from_numpy(whole.select(sums).to_numpy().astype("float64"))

    return [torch.stack([of(frame) for frame in seeds]) for seeds in models]


def _mean_scores(sums: Tensor) -> Tensor:
    # Groups weigh as many positions as they have, here and in every resample: a ratio of two sums.
    total = sums.sum(dim=-2)
    return total[..., :-1] / total[..., -1:]


def _resampled(models: Sequence[Tensor], resamples: int, generator: torch.Generator) -> list[Tensor]:
    """Brier-1 to Brier-4 of each of ``models`` [seeds, groups, 5] on the same draws, [seeds, resamples, 4] each."""
    count = models[0].shape[-2]
    drawn = torch.randint(count, (resamples, count), generator=generator).split(max(1, RESAMPLED_AT_ONCE // count))
    return [torch.cat([_mean_scores(sums[:, some]) for some in drawn], dim=1) for sums in models]


def _of_text(resampled: Tensor, positions: Tensor) -> list[tuple[float, float]]:
    """The variance of a score over texts, by bootstrap, and its degrees of freedom; nothing of a single group.

    ``positions`` [groups] is how many each group has.
    """
    groups = int((positions > 0).sum())
    if groups < 2:
        return []
    # A bootstrap draws from n groups around their own mean, which lies (n - 1) / n too close to them.
    return [(resampled.var().item() * groups / (groups - 1), effective_number(positions) - 1)]


def _of_seeds(scores: Tensor) -> list[tuple[float, float]]:
    """The variance of the mean of ``scores`` [seeds] and its degrees of freedom; nothing of one seed."""
    count = len(scores)
    return [(scores.var().item() / count, count - 1)] if count > 1 else []


def _standard_error(variances: list[tuple[float, float]]) -> tuple[float, float]:
    """Of a sum of independent parts with these variances and degrees of freedom (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in variances)
    squares = sum(variance**2 / freedom for variance, freedom in variances)
    return total**0.5, total**2 / squares if squares else 1.0


def _interval(middle: float, variances: list[tuple[float, float]]) -> list[float] | None:
    if not variances:
        return None
    half = half_width(*_standard_error(variances))
    return [middle - half, middle + half]
