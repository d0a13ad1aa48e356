"""BrierLM: language-model quality from samples alone (paper, section 4).

Brier(P, y) = 2 P(y) - sum_x P(x)^2 is strictly proper, and both of its terms can be estimated without bias
from independent samples: one asks how often a sample is right, the other how often two of them collide.
Brier-n takes the next n tokens as one symbol; BrierLM is 100 times the geometric mean of Brier-1 to Brier-4.

Notable:
- S samples a position give a U-statistic over all S (S - 1) / 2 pairs; two are the paper's estimator;
- a model with exact probabilities needs sampling only for the prefixes of the collision term;
- the interval comes from a bootstrap over documents, since positions of one document are not independent; that of a
  difference draws the same documents for both models.
"""

from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from calm_core.tokens.blocks import MAX_TOKENS

RESAMPLED_AT_ONCE = 1 << 16
"""Documents of a bootstrap's draws that are in memory together."""

SCORES = [f"brier_{n}" for n in range(1, MAX_TOKENS + 1)]


class BrierTerms(NamedTuple):
    """What Brier-1 to Brier-n are made of, each [..., n] float32: Brier = 2 accuracy - collision."""

    accuracy: Tensor
    """How often a sample's first 1 to n tokens are the true ones."""
    collision: Tensor
    """How often those of two samples agree."""


def terms_from_samples(samples: Tensor, targets: Tensor) -> BrierTerms:
    """Unbiased accuracy and collision terms of each position, from S >= 2 samples; as ``brier_from_samples``."""
    count = samples.shape[0]
    if count < 2:
        raise ValueError(f"Brier needs 2 samples a position or more, got {count}")
    # Every sample is an independent draw of the model, so averaging over all of them lowers the variance, not the mean.
    hits = _same_prefix(samples, targets).float().mean(dim=0)
    # Only pairs of different samples: a sample always agrees with itself, which would bias the collision term upwards.
    collisions = torch.zeros_like(hits)
    for index in range(1, count):
        collisions += _same_prefix(samples[:index], samples[index]).float().sum(dim=0)
    return BrierTerms(hits, collisions / (count * (count - 1) / 2))


def brier_from_samples(samples: Tensor, targets: Tensor) -> Tensor:
    """Unbiased Brier-1 to Brier-n of each position, [..., n] float32.

    ``samples`` [S, ..., n] are S >= 2 independent continuations of n token ids, ``targets`` [..., n] the
    true ones: (2 / S) sum_i 1[x_i = y] - 2 / (S (S - 1)) sum_{i<j} 1[x_i = x_j], equality of the first 1 to n tokens.
    """
    accuracy, collision = terms_from_samples(samples, targets)
    return 2 * accuracy - collision


def brier_from_probabilities(target_log_probabilities: Tensor, prefix: Tensor, collision: Tensor) -> Tensor:
    """Unbiased Brier-1 to Brier-n of each position, [..., n] float32, of a model with exact probabilities.

    ``target_log_probabilities`` [..., n] are log P(y_k | y_<k). For S sampled continuations x, ``prefix``
    [S, ..., n] holds log P(x_<k), 0 for k = 1, and ``collision`` [S, ..., n] holds sum_v P(v | x_<k)^2.

    The accuracy term is exact. For the collision term, sum_x P(x)^2 = E_{x_<k ~ P}[P(x_<k) sum_v P(v | x_<k)^2]:
    the second sample's agreement with the first is replaced by its probability, which lowers the variance.
    """
    # Log probabilities of a sequence add up: P(y_1..y_n) = exp(sum log P(y_k | y_<k)).
    accuracy = target_log_probabilities.cumsum(dim=-1).exp()
    return 2 * accuracy - (prefix.exp() * collision).mean(dim=0)


def brierlm(brier: Tensor) -> Tensor:
    """100 * (product of Brier-1 to Brier-4)^(1/4), [...], of averages [..., 4]; any negative average makes it 0.

    The paper says so of a negative product. Two negative averages have a positive one, which would reward a
    model that is wrong and sure of it, such as one whose samples are all the same.
    """
    return 100 * brier.clamp(min=0).prod(dim=-1) ** (1 / MAX_TOKENS)


class BrierLM(NamedTuple):
    """BrierLM and what it is made of; every file of results that has it names and orders these fields so."""

    brierlm: float
    brierlm_ci95: list[float]
    """Quantiles of 2.5 % and 97.5 % of its bootstrap."""
    brier: list[float]
    """Brier-1 to Brier-4, averaged over positions."""
    positions: int
    documents: int


def per_document(document: Tensor, scores: Tensor) -> pl.DataFrame:
    """Sums of ``scores`` [positions, 4] over the positions of each document, with their number.

    ``document`` [positions] numbers the document that each position's target starts in. Both are on the CPU.
    """
    # In float64: sums of a hundred thousand float32 scores would lose the digits that intervals are read off.
    frame = pl.DataFrame({"document": document.numpy()} | dict(zip(SCORES, scores.double().numpy().T, strict=True)))
    positions = pl.len().cast(pl.Int64).alias("positions")
    return frame.group_by("document").agg(positions, pl.col(SCORES).sum()).sort("document")


class Difference(NamedTuple):
    """How much BrierLM of one model is above another's, on the same text."""

    difference: float
    difference_ci95: list[float]
    """Quantiles of 2.5 % and 97.5 % of its bootstrap."""
    p: float
    """Of a difference of either sign where there is none: twice the smaller share of the bootstrap beyond 0."""


def bootstrap_brierlm(documents: pl.DataFrame, resamples: int, generator: torch.Generator) -> BrierLM:
    """BrierLM of a ``per_document`` frame; the interval resamples documents, not positions.

    Positions are averaged first, then comes the geometric mean, in each of ``resamples`` draws of as many
    documents as there are, with replacement.
    """
    sums = _sums(documents)
    mean = _mean_scores(sums)
    resampled = _resampled([sums], resamples, generator)[0]
    return BrierLM(
        brierlm(mean).item(), _interval(resampled), mean.tolist(), int(sums[:, -1].sum().item()), len(documents)
    )


def bootstrap_difference(
    first: pl.DataFrame, second: pl.DataFrame, resamples: int, generator: torch.Generator
) -> Difference:
    """BrierLM of ``first`` minus that of ``second``, both ``per_document`` frames of one text.

    Paired: each draw takes the same documents of both, so that what makes a document easy for both cancels. A document
    that only one of them has positions in counts there alone.
    """
    both = first.join(second, on="document", how="full", coalesce=True, suffix="_second").sort("document").fill_null(0)
    columns = [*SCORES, "positions"]
    pair = [_sums(both), _sums(both.select(pl.col(f"{name}_second").alias(name) for name in columns))]
    first_score, second_score = (brierlm(_mean_scores(sums)).item() for sums in pair)
    resampled = _resampled(pair, resamples, generator)
    differences = resampled[0] - resampled[1]
    below = (differences <= 0).double().mean().item()
    above = (differences >= 0).double().mean().item()
    # A share that no draw has reached is known to be small, not to be 0.
    p = min(1.0, 2 * max(min(below, above), 1 / resamples))
    return Difference(first_score - second_score, _interval(differences), p)


def _sums(documents: pl.DataFrame) -> Tensor:
    """Sums of the scores and number of positions by document, [documents, 5] float64."""
    return torch.from_numpy(documents.select([*SCORES, "positions"]).to_numpy().astype("float64"))


def _mean_scores(sums: Tensor) -> Tensor:
    # Documents weigh as many positions as they have, here and in every resample: a ratio of two sums.
    total = sums.sum(dim=-2)
    return total[..., :-1] / total[..., -1:]


def _resampled(models: list[Tensor], resamples: int, generator: torch.Generator) -> Tensor:
    """BrierLM of each of ``models``, sums by document, on ``resamples`` draws of documents: [models, resamples]."""
    count, scores = len(models[0]), []
    drawn = torch.randint(count, (resamples, count), generator=generator)
    for some in drawn.split(max(1, RESAMPLED_AT_ONCE // count)):
        scores.append(torch.stack([brierlm(_mean_scores(sums[some])) for sums in models]))
    return torch.cat(scores, dim=1)


def _interval(resampled: Tensor) -> list[float]:
    interval: list[float] = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return interval


def _same_prefix(first: Tensor, second: Tensor) -> Tensor:
    """Whether the first 1 to n tokens agree, [..., n] bool."""
    # The running product stays 1 up to the first difference and is 0 from there on.
    return (first == second).cumprod(dim=-1).bool()
