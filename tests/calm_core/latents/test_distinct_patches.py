"""Distinct patches on disk, against the answer in memory and plain Python's."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core.latents import distinct_patches as patch_index
from calm_core.latents.distinct_patches import PatchIndex, distinct_patches, scratch_bytes
from calm_core.tokens.shards import TokenStream, TokenWriter


def stream_of(folder: Path, token_ids: list[int], vocabulary_size: int = 100_000) -> TokenStream:
    writer = TokenWriter(folder, "train", vocabulary_size)
    for start in range(0, len(token_ids), 17):
        writer.write(token_ids[start : start + 17])
        if start % 3 == 0:
            writer.flush()
    writer.flush()
    return TokenStream(folder, "train")


def indexed(token_ids: list[int], patch_size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct patches and the number of each patch, as the index has them."""
    with tempfile.TemporaryDirectory() as folder:
        with PatchIndex(stream_of(Path(folder), token_ids), patch_size, Path(folder)) as index:
            assert index.patches == len(token_ids) // patch_size
            distinct = [tuple(patch) for patch in index.distinct_patches().tolist()]
            half = index.distinct // 2
            assert index.distinct_patches()[half:].tolist() == [list(p) for p in distinct[half:]]
            numbers = np.concatenate([*index.numbers(), np.empty(0, np.int64)]).tolist()
        size = (Path(folder) / "patches.safetensors").stat().st_size
        assert 0 <= size - scratch_bytes(index.patches, patch_size) < 1000
    return distinct, numbers


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=120) | st.lists(st.integers(0, 99_999), min_size=1, max_size=120),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_numbers_follow_first_appearance(token_ids: list[int], patch_size: int, chunk: int, partition: int) -> None:
    with mock.patch.multiple(patch_index, CHUNK_PATCHES=chunk, PARTITION_PATCHES=partition):
        distinct, numbers = indexed(token_ids, patch_size)
    whole = len(token_ids) // patch_size
    patches = [tuple(token_ids[place * patch_size : (place + 1) * patch_size]) for place in range(whole)]
    assert distinct == list(dict.fromkeys(patches))
    assert [distinct[number] for number in numbers] == patches


@pytest.mark.parametrize("symbols", [3, 40, 60_000])
def test_partitions_change_nothing(symbols: int) -> None:
    token_ids = torch.randint(symbols, (20_011,), generator=torch.Generator().manual_seed(0))
    patches, numbers = distinct_patches(token_ids, 2)
    # 79 partitions at least; for 3 symbols 9 distinct patches crowd in a few of them, which are read in pieces.
    with mock.patch.multiple(patch_index, CHUNK_PATCHES=1000, PARTITION_PATCHES=128):
        assert indexed(token_ids.tolist(), 2) == ([tuple(patch) for patch in patches.tolist()], numbers.tolist())
