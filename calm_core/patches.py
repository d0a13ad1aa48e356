"""Patches: a token stream cut into groups of K, and the distinct ones among them.

Natural text repeats its K-grams (half of the default corpus's patches are copies), so what depends on a patch
alone, such as the autoencoder's posterior, is worth computing once for each distinct patch.
"""

from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor


class DistinctPatches(NamedTuple):
    """``patches`` [distinct, K] int64 in order of first appearance; ``patch_index`` [all patches] int32 into them."""

    patches: Tensor
    patch_index: Tensor


def distinct_patches(token_ids: Tensor, patch_size: int) -> DistinctPatches:
    """Cut ``token_ids`` [tokens] into whole patches of ``patch_size`` and find the distinct ones."""
    whole = len(token_ids) // patch_size
    columns = token_ids[: whole * patch_size].view(whole, patch_size).T.to(torch.int32).contiguous().numpy()
    names = [f"token_{position}" for position in range(patch_size)]
    frame = pl.DataFrame(dict(zip(names, columns, strict=True)))
    distinct = frame.unique(maintain_order=True).with_row_index("patch")
    index = frame.join(distinct, on=names, how="left", maintain_order="left")["patch"]
    return DistinctPatches(
        patches=torch.from_numpy(distinct.select(names).to_numpy().copy()).long(),
        patch_index=torch.from_numpy(index.to_numpy().copy()).to(torch.int32),
    )
