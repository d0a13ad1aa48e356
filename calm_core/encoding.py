"""Encoding the corpus: the posterior of every distinct patch of the training split, once.

Training draws a position's targets from here, instead of running the frozen encoder at each step of each epoch.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.artefacts import require_disk_space
from calm_core.autoencoder import Autoencoder
from calm_core.latent_files import SHARD_PATCHES, latent_bytes, posterior_shard, save_index
from calm_core.patch_index import PatchIndex, scratch_bytes
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
    """Write the latents of ``tokens`` into ``folder``, as ``latent_files`` describes them, in bounded memory.

    Raises:
        CalmError: the file system has not enough room for them.
    """
    patch_size, latent_size = model.config.patch_size, model.config.latent_size
    patches = len(tokens) // patch_size
    require_disk_space(folder, scratch_bytes(patches, patch_size), "the latents")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, PatchIndex(tokens, patch_size, Path(scratch)) as index:
        require_disk_space(folder, latent_bytes(index.distinct, patches, latent_size), "the latents")
        with progress("encode corpus", index.distinct, "patches") as advance, autocast(precision, torch.device("cpu")):
            token_states = _token_states(model)
            for shard, start in enumerate(range(0, index.distinct, SHARD_PATCHES)):
                count = min(SHARD_PATCHES, index.distinct - start)
                with posterior_shard(shard, count, latent_size, folder) as file:
                    for row in range(0, count, ENCODING_BATCH):
                        batch = index.distinct_patches(start + row, min(ENCODING_BATCH, count - row))
                        posterior = model.encoder.posterior(F.embedding(batch, token_states))
                        file.write("mean", row, posterior.mean.half().numpy())
                        file.write("log_std", row, posterior.log_std.half().numpy())
                        advance(len(batch))
        save_index(index.numbers(), patches, index.distinct, folder)
        return EncodedCorpus(patches, index.distinct)


def _token_states(model: Autoencoder) -> Tensor:
    """The first half of the encoder for the whole vocabulary, [vocabulary, hidden] float32.

    It looks at one token at a time, so a lookup does in each patch what would be most of the work.
    """
    token_ids = torch.arange(model.config.vocabulary_size)
    return torch.cat([model.encoder.token_states(batch).float() for batch in token_ids.split(ENCODING_BATCH)])
