"""The encoded corpus: posteriors of the distinct patches, and which patch stands where.

``posteriors-NNNNN.safetensors`` hold ``mean`` and ``log_std`` [distinct, latent] in float16, whose rounding
(a part in two thousand) is far below the posterior's own spread; ``index.safetensors`` holds ``patches`` [patches
of the training split] int32. Files are memory-mapped.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calm_core.autoencoder import Posterior
from calm_core.token_files import read_tensors

SHARD_PATCHES = 1 << 20
BYTES_PER_NUMBER = 2


def latent_bytes(distinct: int, patches: int, latent_size: int) -> int:
    """Disk that the latents of ``patches`` patches need, in bytes."""
    return distinct * 2 * latent_size * BYTES_PER_NUMBER + patches * 4


def save_posteriors(posterior: Posterior, shard: int, folder: Path) -> None:
    """Write shard number ``shard`` of the posteriors, [patches, latent] each."""
    tensors = {"mean": posterior.mean.half(), "log_std": posterior.log_std.half()}
    save_file(tensors, folder / f"posteriors-{shard:05d}.safetensors")


def save_index(index: Tensor, folder: Path) -> None:
    """Write which distinct patch each patch of the stream is, [patches] int32."""
    save_file({"patches": index}, folder / "index.safetensors")


class LatentCorpus:
    """Posteriors of any patch of the training split."""

    def __init__(self, folder: Path) -> None:
        shards = [read_tensors(path) for path in sorted(folder.glob("posteriors-*.safetensors"))]
        self._mean = [shard["mean"] for shard in shards]
        self._log_std = [shard["log_std"] for shard in shards]
        self._index = read_tensors(folder / "index.safetensors")["patches"]

    def __len__(self) -> int:
        return len(self._index)

    def posterior(self, positions: Tensor) -> Posterior:
        """Posterior, each [..., latent] float32, of the patches at ``positions`` [...] of the stream."""
        rows = self._index[positions.flatten()].long()
        shape = (*positions.shape, -1)
        return Posterior(_gather(self._mean, rows).view(shape), _gather(self._log_std, rows).view(shape))


def _gather(shards: list[Tensor], rows: Tensor) -> Tensor:
    if len(shards) == 1:
        return shards[0][rows].float()
    gathered = torch.empty(len(rows), shards[0].shape[1])
    for shard, values in enumerate(shards):
        here = rows // SHARD_PATCHES == shard
        gathered[here] = values[rows[here] % SHARD_PATCHES].float()
    return gathered
