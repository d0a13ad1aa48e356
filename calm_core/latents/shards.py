"""The encoded corpus: posteriors of the distinct patches, and the index of each patch of the stream into them.

``posteriors-NNNNN.safetensors`` hold ``mean`` and ``log_std`` [distinct, latent] in float16, whose rounding
(a part in two thousand) is far below the posterior's own spread; ``index.safetensors`` holds ``patches`` [patches
of the training split] int32, or int64 where it takes that to number the distinct ones. Files are memory-mapped.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Posterior
from calm_core.errors import CalmError
from calm_core.storage.safetensors_rows import TensorFile
from calm_core.storage.tensors import read_tensors

SHARD_PATCHES = 1 << 20
BYTES_PER_NUMBER = 2


def latent_bytes(distinct: int, patches: int, latent_size: int) -> int:
    """Disk that the latents of ``patches`` patches need, in bytes."""
    return distinct * 2 * latent_size * BYTES_PER_NUMBER + patches * _index_dtype(distinct).itemsize


def shard_name(shard: int) -> str:
    """File name of shard number ``shard`` of the posteriors."""
    return f"posteriors-{shard:05d}.safetensors"


def posterior_shard(shard: int, patches: int, latent_size: int, folder: Path) -> TensorFile:
    """Shard number ``shard`` of the posteriors: ``mean`` and ``log_std`` [patches, latent], to be filled."""
    shape = (np.float16, (patches, latent_size))
    return TensorFile(folder / shard_name(shard), {"mean": shape, "log_std": shape})


def save_index(pieces: Iterable[np.ndarray], patches: int, distinct: int, folder: Path) -> None:
    """Write which of the ``distinct`` patches each of the stream's ``patches`` is; ``pieces`` follow the stream."""
    shapes = {"patches": (_index_dtype(distinct), (patches,))}
    with TensorFile(folder / "index.safetensors", shapes) as file:
        row = 0
        for piece in pieces:
            file.write("patches", row, piece)
            row += len(piece)


class LatentCorpus:
    """Posteriors of any patch of the training split."""

    def __init__(self, folder: Path) -> None:
        numbers = (2, ("float16",))
        paths = sorted(folder.glob("posteriors-*.safetensors"))
        shards = [read_tensors(path, {"mean": numbers, "log_std": numbers}) for path in paths]
        self._mean = [shard["mean"] for shard in shards]
        self._log_std = [shard["log_std"] for shard in shards]
        index = read_tensors(folder / "index.safetensors", {"patches": (1, ("int32", "int64"))})
        self._index = index["patches"]
        self._require_rows(folder)

    def __len__(self) -> int:
        return len(self._index)

    def _require_rows(self, folder: Path) -> None:
        """Raise CalmError unless the shards fit together and have every row that the index asks for."""
        sizes = [mean.shape for mean in self._mean]
        fit = all(mean.shape == log_std.shape for mean, log_std in zip(self._mean, self._log_std, strict=True))
        # ``_gather`` finds a row's shard by division, so all but the last have to be full.
        full = all(size[0] == SHARD_PATCHES for size in sizes[:-1]) and len({size[1] for size in sizes}) == 1
        rows = sum(size[0] for size in sizes)
        first, last = self._index.aminmax() if len(self._index) else (0, -1)
        if not fit or not full or not 0 <= first <= last + 1 <= rows:
            raise CalmError(f"{folder} is damaged: its files do not fit together; delete it and run `dvc repro`")

    def posterior(self, positions: Tensor) -> Posterior:
        """Posterior, each [..., latent] float32, of the patches at ``positions`` [...] of the stream."""
        rows = self._index[positions.flatten()].long()
        shape = (*positions.shape, -1)
        # Float32 from here on: sampling and the loss need more than float16's three digits.
        return Posterior(_gather(self._mean, rows).view(shape), _gather(self._log_std, rows).view(shape))


def _gather(shards: list[Tensor], rows: Tensor) -> Tensor:
    if len(shards) == 1:
        return shards[0][rows].float()
    gathered = torch.empty(len(rows), shards[0].shape[1])
    shard_of = rows // SHARD_PATCHES
    # One indexed read a shard: rows are random, and the files may be far larger than memory.
    for shard in shard_of.unique().tolist():
        here = shard_of == shard
        gathered[here] = shards[shard][rows[here] % SHARD_PATCHES].float()
    return gathered


def _index_dtype(distinct: int) -> np.dtype:
    return np.dtype(np.int32 if distinct <= 1 << 31 else np.int64)
