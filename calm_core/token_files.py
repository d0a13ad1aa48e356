"""Token shards: a split's documents, one after the other, as safetensors files.

A shard holds ``token_ids`` (uint16 where the vocabulary allows, else int32) and ``document_ends``
(int64: the position, in the whole split, after each document's end-of-text token). Files are memory-mapped, so
a split larger than memory reads like a small one.
"""

import bisect
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.artefacts import read_json
from calm_core.errors import CalmError

SHARD_TOKENS = 1 << 24
DESCRIPTION = "description.json"


class TokenWriter:
    """Writes documents of one split to ``folder``/``split``-NNNNN.safetensors."""

    def __init__(self, folder: Path, split: str, vocabulary_size: int) -> None:
        self._folder, self._split = folder, split
        self._dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.int32
        self._pieces: list[np.ndarray] = []
        self._ends: list[int] = []
        self._pending = 0
        self.paths: list[Path] = []
        self.tokens = self.documents = 0

    def write(self, token_ids: list[int]) -> None:
        """Add one document, its end-of-text token included."""
        self._pieces.append(np.array(token_ids, dtype=self._dtype))
        self.tokens += len(token_ids)
        self.documents += 1
        self._ends.append(self.tokens)
        self._pending += len(token_ids)
        if self._pending >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pieces:
            return
        path = self._folder / f"{self._split}-{len(self.paths):05d}.safetensors"
        tensors = {
            "token_ids": torch.from_numpy(np.concatenate(self._pieces)),
            "document_ends": torch.tensor(self._ends, dtype=torch.int64),
        }
        save_file(tensors, path)
        self.paths.append(path)
        self._pieces, self._ends, self._pending = [], [], 0


class TokenStream:
    """The token ids of one split as a single sequence, read from memory-mapped shards."""

    def __init__(self, folder: Path, split: str) -> None:
        shards = [read_tensors(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
        if not shards:
            raise CalmError(f"{folder} holds no {split} tokens; `dvc repro tokenise` makes them")
        self._shards = [shard["token_ids"] for shard in shards]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        self.document_ends: Tensor = torch.cat([shard["document_ends"] for shard in shards])

    def __len__(self) -> int:
        return self._starts[-1]

    def slice(self, start: int, length: int) -> Tensor:
        """Token ids [length] int64 from position ``start`` on; must lie inside the split."""
        pieces: list[Tensor] = []
        index = bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            offset = start - self._starts[index]
            piece = self._shards[index][offset : offset + length]
            pieces.append(piece)
            start, length, index = start + len(piece), length - len(piece), index + 1
        return torch.cat(pieces).to(torch.int64)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Token ids [len(starts), length] int64, a row from each of ``starts``."""
        return torch.stack([self.slice(start, length) for start in starts.tolist()])


def vocabulary_size(folder: Path) -> int:
    """How many token ids there are, as the description in ``folder`` says."""
    return int(read_json(folder / DESCRIPTION)["vocabulary_size"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises CalmError where it is missing or damaged."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CalmError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from None
