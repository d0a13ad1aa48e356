"""Which items of the training split a step trains on: a function of seed, stage and step alone."""

from functools import lru_cache

import torch
from torch import Tensor

from calm_core.runtime.randomness import generator

NAMED_ITEMS = 8
"""How many items of a batch a message names."""


def batch_indices(step: int, batch: int, count: int, seed: int, stage: str) -> Tensor:
    """Which ``batch`` of ``count`` items step number ``step`` trains on: each once an epoch, newly shuffled."""
    # A batch may span the end of an epoch, and several of them where the split is smaller than a batch.
    pieces: list[Tensor] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, first = divmod(position, count)
        pieces.append(_epoch_order(epoch, count, seed, stage)[first : first + end - position])
        position += len(pieces[-1])
    return torch.cat(pieces)


# An order is a permutation of the whole split. A batch needs that of its epoch and, at the end of it, of the next.
@lru_cache(maxsize=2)
def _epoch_order(epoch: int, count: int, seed: int, stage: str) -> Tensor:
    # Keyed by the epoch, so that a resumed training needs none of the epochs before.
    return torch.randperm(count, generator=generator(seed, stage, "order", epoch))


def described_batch(items: str, starts: Tensor) -> str:
    """In words: a batch of ``items`` that begin at tokens ``starts`` of the training split; names the first few."""
    named = ", ".join(f"{start:,}" for start in starts[:NAMED_ITEMS].tolist())
    rest = f" and {len(starts) - NAMED_ITEMS} more" if len(starts) > NAMED_ITEMS else ""
    return f"{items} from tokens {named}{rest} of the training split"
