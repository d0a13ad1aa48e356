"""Token shards: a split's documents, one after the other, as safetensors files.

A shard holds ``token_ids`` (uint16 where the vocabulary allows, else int32) and ``document_ends``
(int64: the position, in the whole split, after each document and its marks). Files are memory-mapped, so
a split larger than memory reads like a small one.
"""

import bisect
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.storage.json_io import read_json
from calm_core.storage.provenance import DESCRIPTION
from calm_core.storage.safetensors_rows import Shape, TensorFile, map_tensors
from calm_core.storage.tensors import Expected, damaged, require_tensors

SHARD_TOKENS = 1 << 24
COPIED_TOKENS = 1 << 20
"""How many pending tokens are copied at a time when their shard is written."""


class TokenWriter:
    """Writes documents of one split to ``folder``/``split``-NNNNN.safetensors.

    Token ids are buffered on disk until their shard is full; memory holds eight bytes for each of its documents.
    ``shards``, ``documents`` and ``tokens`` are what the split has already.
    """

    def __init__(
        self, folder: Path, split: str, vocabulary_size: int, shards: int = 0, documents: int = 0, tokens: int = 0
    ) -> None:
        self._folder, self._split, self._vocabulary_size = folder, split, vocabulary_size
        # Half the disk and page cache where 16 bits suffice.
        self._dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.int32)
        self._pending = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the writer
        # Eight bytes an entry, where a list of Python integers takes some forty.
        self._ends = array("q")
        self._written = tokens
        self.paths: list[Path] = []
        self.shards, self.documents, self.tokens = shards, documents, tokens

    @property
    def room(self) -> int:
        """How many tokens fill the shard that is being written."""
        return self._written + SHARD_TOKENS - self.tokens

    def write(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Add one document, its marks included."""
        self.write_documents(np.asarray(token_ids), np.array([len(token_ids)]))

    def write_documents(self, token_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents of ``lengths`` tokens, their marks included, that follow each other in ``token_ids``."""
        # Before they are stored in 16 bits, where a larger id would become another token's.
        smallest, largest = token_ids.min(initial=0), token_ids.max(initial=0)
        if smallest < 0 or largest >= self._vocabulary_size:
            wrong = smallest if smallest < 0 else largest
            raise CalmError(f"token {wrong} is outside of the vocabulary of {self._vocabulary_size:,}")
        ends = lengths.cumsum()
        while len(ends):
            # A shard ends with the document that fills it.
            room = self.room
            count = min(int(np.searchsorted(ends, room)) + 1, len(ends))
            tokens = int(ends[count - 1])
            self._pending.write(token_ids[:tokens].astype(self._dtype).data)
            self._ends.frombytes((self.tokens + ends[:count]).astype(np.int64).tobytes())
            self.tokens += tokens
            self.documents += count
            if tokens >= room:
                self.flush()
            token_ids, ends = token_ids[tokens:], ends[count:] - tokens

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._ends:
            return
        path = self._folder / f"{self._split}-{self.shards:05d}.safetensors"
        count = self.tokens - self._written
        shapes: dict[str, Shape] = {
            "token_ids": (self._dtype, (count,)),
            "document_ends": (np.int64, (len(self._ends),)),
        }
        self._pending.seek(0)
        with TensorFile(path, shapes) as file:
            file.write("document_ends", 0, np.frombuffer(self._ends, np.int64))
            for start in range(0, count, COPIED_TOKENS):
                piece = self._pending.read(min(COPIED_TOKENS, count - start) * self._dtype.itemsize)
                file.write("token_ids", start, np.frombuffer(piece, self._dtype))
        self._pending.seek(0)
        self._pending.truncate()
        self._ends, self._written = array("q"), self.tokens
        self.paths.append(path)
        self.shards += 1


class TokenStream:
    """The token ids of one split as a single sequence, read from memory-mapped shards."""

    def __init__(self, folder: Path, split: str) -> None:
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not paths:
            raise CalmError(f"{folder} holds no {split} tokens; `dvc repro tokenise` makes them")
        expected = {"token_ids": (1, ("uint16", "int32")), "document_ends": (1, ("int64",))}
        shards = [_mapped(path, expected) for path in paths]
        self._shards = [shard["token_ids"] for shard in shards]
        self._ends = [shard["document_ends"] for shard in shards]
        # Shards differ in length, since a document is never split over two.
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def document_ends(self) -> Tensor:
        """Position after each document and its marks, [documents] int64."""
        return torch.from_numpy(np.concatenate(self._ends))

    def shards(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each shard the token ids [tokens], uint16 or int32, and the end of each document in it, [documents] int64.

        Both are memory-mapped until they are used; ends count from the beginning of the shard.
        """
        for token_ids, ends, start in zip(self._shards, self._ends, self._starts.tolist(), strict=False):
            yield token_ids, ends - start

    def slice(self, start: int, length: int) -> Tensor:
        """Token ids [length] int64 from position ``start`` on; must lie inside the split."""
        # Int64, as torch indexes: converted while it is copied out of the mapping.
        token_ids = np.empty(length, np.int64)
        index, done = bisect.bisect_right(self._starts, start) - 1, 0
        while done < length:
            offset = start + done - self._starts[index]
            piece = self._shards[index][offset : offset + length - done]
            token_ids[done : done + len(piece)] = piece
            done, index = done + len(piece), index + 1
        return torch.from_numpy(token_ids)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Token ids [len(starts), length] int64, a row from each of ``starts``."""
        token_ids = np.empty((len(starts), length), np.int64)
        shard_of = np.searchsorted(self._starts, starts.numpy(), side="right") - 1
        # One indexed read of each shard, not one of each window: batches have hundreds.
        for index in set(shard_of.tolist()):
            shard, rows = self._shards[index], np.flatnonzero(shard_of == index)
            offsets = starts.numpy()[rows] - self._starts[index]
            inside = offsets + length <= len(shard)
            token_ids[rows[inside]] = shard[offsets[inside, None] + np.arange(length)]
            for row in rows[~inside]:  # runs on into the next shard
                token_ids[row] = self.slice(int(starts[row]), length)
        return torch.from_numpy(token_ids)


def vocabulary_size(folder: Path) -> int:
    """How many token ids there are, as the description in ``folder`` says."""
    description = read_json(folder / DESCRIPTION)
    size = description.get("vocabulary_size") if isinstance(description, dict) else None
    if type(size) is not int or size < 1:
        raise CalmError(f"{folder / DESCRIPTION} is damaged; delete {folder} and run `dvc repro`")
    return size


def _mapped(path: Path, expected: Expected) -> dict[str, np.ndarray]:
    try:
        tensors = map_tensors(path)
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(path, error) from None
    require_tensors(path, {name: (tensor.ndim, tensor.dtype.name) for name, tensor in tensors.items()}, expected)
    return tensors
