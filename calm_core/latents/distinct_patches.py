"""Deduplication of a split's patches out of core: the distinct patches, and the index of each patch into them.

External hash partitioning: patches are partitioned on disk by a hash, so that copies share a partition, and each
partition is deduplicated in memory. A last pass over the stream numbers the distinct patches by first appearance, so
that the result does not depend on the partitions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from calm_core.storage.safetensors_rows import Shape, TensorFile, map_tensors
from calm_core.tokens.shards import TokenStream

CHUNK_PATCHES = 1 << 18
"""Patches of the stream that are in memory together."""
PARTITION_PATCHES = 1 << 18
"""Patches of a partition on average, at most; larger partitions are deduplicated in pieces of twice as many."""

_MULTIPLIER = np.uint64(0xFF51AFD7ED558CCD)  # odd, of MurmurHash3's finaliser


class DistinctPatches(NamedTuple):
    """``patches`` [distinct, K] int64 in order of first appearance; ``patch_index`` [all patches] int32 into them."""

    patches: Tensor
    patch_index: Tensor


def distinct_patches(token_ids: Tensor, patch_size: int) -> DistinctPatches:
    """Cut ``token_ids`` [tokens] into whole patches of ``patch_size`` and find the distinct ones."""
    whole = len(token_ids) // patch_size
    patches = np.ascontiguousarray(token_ids[: whole * patch_size].view(whole, patch_size).numpy(), np.int32)
    # A patch as one value of so many bytes: np.unique of values takes less than half the time of np.unique of rows.
    values = patches.view(np.dtype((np.void, patches.itemsize * patch_size))).reshape(whole)
    _, first, value_index = np.unique(values, return_index=True, return_inverse=True)
    # np.unique sorts by bytes, an order that depends on the machine's byte order; first appearance does not.
    by_appearance = np.argsort(first)
    number = np.empty(len(first), np.int32)
    number[by_appearance] = np.arange(len(first), dtype=np.int32)
    return DistinctPatches(
        patches=torch.from_numpy(patches[first[by_appearance]]).long(),
        patch_index=torch.from_numpy(number[value_index]),
    )


def scratch_bytes(patches: int, patch_size: int) -> int:
    """Disk that a ``PatchIndex`` of ``patches`` patches needs, in bytes."""
    # Two columns of K int32 and two of an int64, see ``PatchIndex``.
    return patches * (2 * 4 * patch_size + 2 * 8)


class PatchIndex:
    """The distinct patches of ``tokens``, numbered by first appearance, and the number of each patch of the stream.

    Both are in a file of the folder ``scratch``. ``patches`` counts the whole patches of the stream, ``distinct`` the
    distinct ones.
    """

    def __init__(self, tokens: TokenStream, patch_size: int, scratch: Path) -> None:
        self._tokens, self._patch_size = tokens, patch_size
        self.patches = len(tokens) // patch_size
        self.distinct = 0
        self._partitions = max(1, -(-self.patches // PARTITION_PATCHES))
        columns: dict[str, Shape] = {
            # The stream's patches by partition, within a partition in the order of the stream.
            "patch": (np.int32, (self.patches, patch_size)),
            "number": (np.int64, (self.patches,)),
            # The distinct patches of each partition, at its beginning.
            "number_of_distinct": (np.int64, (self.patches,)),
            # The distinct patches of all.
            "distinct": (np.int32, (self.patches, patch_size)),
        }
        self.path = scratch / "patches.safetensors"
        self._file = TensorFile(self.path, columns)
        # A first pass counts, so that each partition has its place in the file before anything is written.
        counts = sum((chunk.counts for chunk in self._chunks()), start=np.zeros(self._partitions, np.int64))
        self._starts = np.cumsum([0, *counts])
        self._deal()
        sizes = [self._find_distinct(partition) for partition in range(self._partitions)]
        self._number_distinct()
        for partition, size in enumerate(sizes):
            self._number_all(partition, size)
        self._file.flush()

    def distinct_patches(self) -> np.ndarray:
        """Token ids [distinct, K] int32, memory-mapped; another process can map the file at ``path``."""
        return map_distinct_patches(self.path)[: self.distinct]

    def numbers(self) -> Iterator[np.ndarray]:
        """The number of each patch of the stream, in pieces [patches] int64."""
        cursors = self._starts[:-1].copy()
        for chunk in self._chunks():
            numbers = np.empty(len(chunk.order), np.int64)
            # The inverse of the chunk's permutation: from the order of partitions back to that of the stream.
            numbers[chunk.order] = self._read_dealt(cursors, chunk.counts)
            yield numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _chunks(self) -> "Iterator[_Chunk]":
        for start in range(0, self.patches, CHUNK_PATCHES):
            count = min(CHUNK_PATCHES, self.patches - start)
            token_ids = self._tokens.slice(start * self._patch_size, count * self._patch_size)
            patches = token_ids.numpy().astype(np.int32).reshape(count, self._patch_size)
            partition = _partition(patches, self._partitions)
            # Stable: within a partition the order stays that of the stream, by which first appearances are found.
            order = np.argsort(partition, kind="stable")
            yield _Chunk(patches, order, np.bincount(partition, minlength=self._partitions))

    def _deal(self) -> None:
        cursors = self._starts[:-1].copy()
        for chunk in self._chunks():
            self._write_parts("patch", chunk.patches[chunk.order], chunk.counts, cursors)

    def _find_distinct(self, partition: int) -> int:
        """Write, for each patch of ``partition``, its distinct patch as a row of "number_of_distinct"; count those."""
        distinct = torch.empty(0, self._patch_size, dtype=torch.int64)
        first, end = self._starts[partition : partition + 2].tolist()
        for start in range(first, end, 2 * PARTITION_PATCHES):
            patches = self._file.read("patch", start, min(2 * PARTITION_PATCHES, end - start))
            before = len(distinct)
            # The distinct patches so far come first, so they keep their rows and new ones get the rows after them.
            stream = torch.cat([distinct.int(), torch.from_numpy(patches)]).flatten()
            distinct, rows = distinct_patches(stream, self._patch_size)
            self._file.write("number", start, first + rows[before:].numpy().astype(np.int64))
        return len(distinct)

    def _number_distinct(self) -> None:
        """Number the distinct patches by first appearance in the stream."""
        cursors, next_rows = self._starts[:-1].copy(), self._starts[:-1].copy()
        for chunk in self._chunks():
            rows = self._read_dealt(cursors, chunk.counts)
            # Rows follow first appearance in their partition: what was not seen before are the rows from the next on.
            candidates = np.flatnonzero(rows >= np.repeat(next_rows, chunk.counts))
            new_rows, first = np.unique(rows[candidates], return_index=True)
            positions = chunk.order[candidates[first]]
            by_appearance = np.argsort(positions)
            self._file.write("distinct", self.distinct, chunk.patches[positions[by_appearance]])
            numbers = np.empty(len(new_rows), np.int64)
            numbers[by_appearance] = np.arange(self.distinct, self.distinct + len(new_rows))
            self.distinct += len(new_rows)
            # How many of the new rows each partition has; they are sorted, as partitions are.
            counts = np.diff(np.searchsorted(new_rows, self._starts))
            self._write_parts("number_of_distinct", numbers, counts, next_rows)

    def _number_all(self, partition: int, size: int) -> None:
        """Replace the rows that ``_find_distinct`` wrote by their numbers."""
        first, end = self._starts[partition : partition + 2].tolist()
        # One partition's table of numbers fits in memory; that of all would not.
        numbers = self._file.read("number_of_distinct", first, size)
        for start in range(first, end, CHUNK_PATCHES):
            rows = self._file.read("number", start, min(CHUNK_PATCHES, end - start))
            self._file.write("number", start, numbers[rows - first])

    def _write_parts(self, name: str, values: np.ndarray, counts: np.ndarray, cursors: np.ndarray) -> None:
        """Append the next ``counts`` values of each partition at its cursor, and advance the cursor."""
        ends = np.cumsum(counts)
        for partition in np.flatnonzero(counts):
            part = values[ends[partition] - counts[partition] : ends[partition]]
            self._file.write(name, int(cursors[partition]), part)
        cursors += counts

    def _read_dealt(self, cursors: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The next ``counts`` entries of "number" of each partition, concatenated; advances the cursors."""
        parts = [self._file.read("number", int(cursors[p]), int(counts[p])) for p in np.flatnonzero(counts)]
        cursors += counts
        return np.concatenate(parts)


def map_distinct_patches(path: Path) -> np.ndarray:
    """The distinct patches [.., K] int32 of the ``PatchIndex`` whose file is ``path``, then unused rows."""
    return map_tensors(path)["distinct"]


class _Chunk(NamedTuple):
    """A piece of the stream: its patches [n, K], their order by partition [n], and how many each partition has."""

    patches: np.ndarray
    order: np.ndarray
    counts: np.ndarray


def _partition(patches: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each of ``patches`` [n, K], [n] int64: a hash of its tokens."""
    mixed = np.zeros(len(patches), np.uint64)
    for token_ids in patches.T:
        # Products wrap modulo 2^64, as hashes of this kind mean them to.
        mixed = (mixed ^ token_ids.astype(np.uint64)) * _MULTIPLIER
        # Carries the well mixed high bits down to those that decide the remainder.
        mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(partitions)).astype(np.int64)
