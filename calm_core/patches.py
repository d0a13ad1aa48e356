"""Patches: a token stream cut into groups of K, and the distinct ones among them.

Natural text repeats its K-grams (half of the default corpus's patches are copies), so what depends on a patch
alone, such as the autoencoder's posterior, is worth computing once for each distinct patch.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class DistinctPatches(NamedTuple):
    """``patches`` [distinct, K] int64 in order of first appearance; ``patch_index`` [all patches] int32 into them."""

    patches: Tensor
    patch_index: Tensor


def distinct_patches(token_ids: Tensor, patch_size: int) -> DistinctPatches:
    """Cut ``token_ids`` [tokens] into whole patches of ``patch_size`` and find the distinct ones."""
    whole = len(token_ids) // patch_size
    patches = np.ascontiguousarray(token_ids[: whole * patch_size].view(whole, patch_size).numpy(), np.int32)
    # A patch as one value of so many bytes: numpy finds those in less than half the time that rows take it.
    values = patches.view(np.dtype((np.void, patches.itemsize * patch_size))).reshape(whole)
    _, first, value_index = np.unique(values, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    number = np.empty(len(first), np.int32)
    number[by_appearance] = np.arange(len(first), dtype=np.int32)
    return DistinctPatches(
        patches=torch.from_numpy(patches[first[by_appearance]]).long(),
        patch_index=torch.from_numpy(number[value_index]),
    )
