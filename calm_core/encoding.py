"""Encoding the corpus: the posterior of every distinct patch of the training split, once.

Training draws a position's targets from here, instead of running the frozen encoder at each step of each epoch.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from calm_core.artefacts import require_disk_space
from calm_core.autoencoder import Autoencoder, Posterior
from calm_core.latent_files import SHARD_PATCHES, latent_bytes, save_index, save_posteriors
from calm_core.patches import distinct_patches
from calm_core.precision import Precision, autocast
from calm_core.progress import progress
from calm_core.token_files import TokenStream

ENCODING_BATCH = 4096


class EncodedCorpus(NamedTuple):
    """How many patches the split has, and how many distinct ones."""

    patches: int
    distinct: int


@torch.no_grad()
def encode_corpus(model: Autoencoder, tokens: TokenStream, folder: Path, precision: Precision) -> EncodedCorpus:
    """Write the latents of ``tokens`` into ``folder``, as ``latent_files`` describes them.

    Raises:
        CalmError: the file system has not enough room for them.
    """
    distinct, index = distinct_patches(tokens.slice(0, len(tokens)), model.config.patch_size)
    require_disk_space(folder, latent_bytes(len(distinct), len(index), model.config.latent_size), "the latents")
    with progress("encode corpus", len(distinct), "patches") as advance, autocast(precision, torch.device("cpu")):
        for shard, patches in enumerate(distinct.split(SHARD_PATCHES)):
            means, log_stds = [], []
            for batch in patches.split(ENCODING_BATCH):
                posterior = model.encode(batch)
                means.append(posterior.mean.half())
                log_stds.append(posterior.log_std.half())
                advance(len(batch))
            save_posteriors(Posterior(torch.cat(means), torch.cat(log_stds)), shard, folder)
    save_index(index, folder)
    return EncodedCorpus(len(index), len(distinct))
