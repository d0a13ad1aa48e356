"""BrierLM over seeds and documents together: its interval, and that of the difference of two models.

A score is uncertain twice: other documents would give another, and so would another seed of the trainings. Both are
drawn at random, and each document meets each seed, so the two variances are estimated apart and added:

- of documents, by a bootstrap that draws whole documents, since positions of one are not independent; the same draws
  for every seed and, of a difference, for both models: what makes a document easy for all cancels;
- of seeds, by the variance of their scores over their number; of a difference, the sum of both models'.

The interval is +- t standard errors, where the degrees of freedom are those of Welch and Satterthwaite: three seeds
know little of their own variance. Percentiles of a bootstrap that draws seeds as well cover too seldom with so few
(docs/method.md has both coverages, by simulation). With one seed the interval is over documents alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from calm_core.evaluation.brier import SCORES, brierlm

RESAMPLED_AT_ONCE = 1 << 16
"""Documents of a bootstrap's draws that are in memory together."""

CONFIDENCE = 0.95


class BrierLM(NamedTuple):
    """BrierLM and what it is made of; every file of results that has it names and orders these fields so."""

    brierlm: float
    """The mean over seeds."""
    brierlm_ci95: list[float]
    brier: list[float]
    """Brier-1 to Brier-4, averaged over positions, then over seeds."""
    positions: int
    documents: int


class Difference(NamedTuple):
    """How much BrierLM of one model is above another's, on the same text."""

    difference: float
    difference_ci95: list[float]
    p: float
    """Of a difference of this size, of either sign, where there is none."""


def estimate_brierlm(seeds: Sequence[pl.DataFrame], resamples: int, generator: torch.Generator) -> BrierLM:
    """BrierLM of one model, trained under one seed or several: a ``brier.per_document`` frame of each.

    Positions are averaged first, then comes the geometric mean, in each of ``resamples`` draws of documents, too.
    """
    sums = _aligned([seeds])[0]
    scores = brierlm(_mean_scores(sums))
    resampled = _resampled([sums], resamples, generator)[0]
    mean = scores.mean().item()
    low, high = _interval(mean, [*_of_seeds(scores), (resampled.var().item(), sums.shape[1] - 1)])
    counts = sums[0, :, -1]
    return BrierLM(
        mean,
        [max(0.0, low), high],  # no score is below
        _mean_scores(sums).mean(dim=0).tolist(),
        int(counts.sum().item()),
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
    drawn = _resampled(models, resamples, generator)
    of_documents = ((drawn[0] - drawn[1]).var().item(), models[0].shape[1] - 1)
    variances = [*_of_seeds(scores[0]), *_of_seeds(scores[1]), of_documents]
    error, freedom = _standard_error(variances)
    # Models that agree on every document leave nothing to tell apart; any other difference then is certain.
    p = float(2 * stdtr(freedom, -abs(difference) / error)) if error else float(difference == 0)
    return Difference(difference, _interval(difference, variances), p)


def half_width(standard_error: float, freedom: float) -> float:
    """Of the interval of a mean whose ``standard_error`` has so many degrees of freedom, by Student's t."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * standard_error


def _aligned(models: Sequence[Sequence[pl.DataFrame]]) -> list[Tensor]:
    """Sums of scores and numbers of positions of the same documents, [seeds, documents, 5] float64 of each model."""
    every = pl.concat([frame.select("document") for seeds in models for frame in seeds]).unique().sort("document")

    def of(frame: pl.DataFrame) -> Tensor:
        whole = every.join(frame, on="document", how="left", maintain_order="left").fill_null(0)
        return torch.from_numpy(whole.select([*SCORES, "positions"]).to_numpy().astype("float64"))

    return [torch.stack([of(frame) for frame in seeds]) for seeds in models]


def _mean_scores(sums: Tensor) -> Tensor:
    # Documents weigh as many positions as they have, here and in every resample: a ratio of two sums.
    total = sums.sum(dim=-2)
    return total[..., :-1] / total[..., -1:]


def _resampled(models: Sequence[Tensor], resamples: int, generator: torch.Generator) -> Tensor:
    """The mean over seeds of each of ``models`` [seeds, documents, 5], on the same draws, [models, resamples]."""
    count, means = models[0].shape[-2], []
    drawn = torch.randint(count, (resamples, count), generator=generator)
    for some in drawn.split(max(1, RESAMPLED_AT_ONCE // count)):
        means.append(torch.stack([brierlm(_mean_scores(sums[:, some])).mean(dim=0) for sums in models]))
    return torch.cat(means, dim=1)


def _of_seeds(scores: Tensor) -> list[tuple[float, int]]:
    """The variance of the mean of ``scores`` [seeds] and its degrees of freedom; nothing of one seed."""
    count = len(scores)
    return [(scores.var().item() / count, count - 1)] if count > 1 else []


def _standard_error(variances: list[tuple[float, int]]) -> tuple[float, float]:
    """Of a sum of independent parts with these variances and degrees of freedom (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in variances)
    squares = sum(variance**2 / max(freedom, 1) for variance, freedom in variances)
    return total**0.5, total**2 / squares if squares else 1.0


def _interval(middle: float, variances: list[tuple[float, int]]) -> list[float]:
    half = half_width(*_standard_error(variances))
    return [middle - half, middle + half]
