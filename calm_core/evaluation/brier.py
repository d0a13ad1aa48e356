"""BrierLM: language-model quality from samples alone (paper, section 4).

Brier(P, y) = 2 P(y) - sum_x P(x)^2 is strictly proper, and both of its terms can be estimated without bias
from independent samples: one asks how often a sample is right, the other how often two of them collide.
Brier-n takes the next n tokens as one symbol; BrierLM is 100 times the geometric mean of Brier-1 to Brier-4.

Notable:
- S samples a position give a U-statistic over all S (S - 1) / 2 pairs; two are the paper's estimator;
- a model with exact probabilities needs sampling only for the prefixes of the collision term;
- scores are summed by document: intervals (intervals.py) resample documents, as positions of one are not independent,
  or groups of documents, where they resemble each other;
- and by eighth of the block, since a position knows what stands before it in its block, and no more.
"""

from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from calm_core.tokens.blocks import MAX_TOKENS

SCORES = [f"brier_{n}" for n in range(1, MAX_TOKENS + 1)]

GROUP = "group"
"""The column that says which documents belong together; intervals are over what it tells apart."""

PARTS = 8
"""Equal parts of a block by which scores are told apart, eighths."""


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


def per_document(document: Tensor, eighth: Tensor, scores: Tensor) -> pl.DataFrame:
    """Sums of ``scores`` [positions, 4] over the positions of a document in an eighth of a block, with their number.

    ``document`` [positions] numbers the document that each position's target starts in, ``eighth`` [positions] the part
    of its block that the position lies in, see ``eighth_of``. All are on the CPU.
    """
    # In float64: sums of a hundred thousand float32 scores would lose the digits that intervals are read off.
    places = {"document": document.numpy(), "eighth": eighth.numpy()}
    frame = pl.DataFrame(places | dict(zip(SCORES, scores.double().numpy().T, strict=True)))
    positions = pl.len().cast(pl.Int64).alias("positions")
    keys = list(places)
    # In the order of the rows, see ``intervals``: the last digit of a sum depends on it.
    return frame.group_by(keys, maintain_order=True).agg(positions, pl.col(SCORES).sum()).sort(keys)


def by_document(frame: pl.DataFrame) -> pl.DataFrame:
    """``frame``, as ``per_document`` gives it, summed over the eighths: a row a document; its group stays, if named."""
    keys = [name for name in ("document", GROUP) if name in frame.columns]
    return frame.group_by(keys, maintain_order=True).agg(pl.col("positions", *SCORES).sum()).sort("document")


def with_groups(frame: pl.DataFrame, groups: Tensor) -> pl.DataFrame:
    """``frame`` with the group of each of its documents, out of ``groups`` [documents] int64 of the whole split."""
    return frame.with_columns(pl.Series(GROUP, groups.numpy()[frame["document"].to_numpy()]))


def eighth_of(tokens_before: Tensor, context: int) -> Tensor:
    """Which eighth of a block, 0 to 7, positions are in that have ``tokens_before`` (1 to ``context``) before them."""
    return (PARTS * tokens_before - 1) // context


def tokens_before(eighth: int, context: int) -> list[int]:
    """The fewest and the most tokens of the block that stand before a position in ``eighth``."""
    return [eighth * context // PARTS + 1, (eighth + 1) * context // PARTS]


def _same_prefix(first: Tensor, second: Tensor) -> Tensor:
    """Whether the first 1 to n tokens agree, [..., n] bool."""
    # The running product stays 1 up to the first difference and is 0 from there on.
    return (first == second).cumprod(dim=-1).bool()
