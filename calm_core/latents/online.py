"""Posteriors of patches computed when a training asks for them, for a corpus whose latents no disk holds.

The encoder's pass comes anew in each epoch. At the published sizes it is 0.7 % of a step's FLOPs, and encoding ahead
would take 68 TB (docs/performance.md); the reference trains like this.
"""

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, Posterior
from calm_core.runtime.precision import Precision, autocast
from calm_core.tokens.shards import TokenStream
from calm_core.training.objective import on_device


class OnlineLatents:
    """What ``LatentCorpus`` is, from the ``tokens`` of the split themselves, on the device of ``autoencoder``."""

    def __init__(self, tokens: TokenStream, autoencoder: Autoencoder, precision: Precision) -> None:
        self._tokens, self._autoencoder, self._precision = tokens, autoencoder, precision
        self._patch_size = autoencoder.config.patch_size

    def __len__(self) -> int:
        return len(self._tokens) // self._patch_size

    @torch.no_grad()
    def posterior(self, positions: Tensor) -> Posterior:
        """Posterior, each [..., latent] float32, of the patches at ``positions`` [...] of the stream."""
        token_ids = self._tokens.windows(positions.flatten() * self._patch_size, self._patch_size)
        device = self._autoencoder.encoder.embedding.weight.device
        # Here and not in the loss, whose autocast is that of another thread where batches are made ahead.
        with autocast(self._precision, device):
            mean, log_std = self._autoencoder.encode(on_device(token_ids, device))
        return Posterior(mean.unflatten(0, positions.shape), log_std.unflatten(0, positions.shape))
