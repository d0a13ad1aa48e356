"""Encoding the corpus: the posterior of every distinct patch of the training split, once.

Training draws a position's targets from here, instead of running the frozen encoder at each step of each epoch. Each
shard of posteriors is a piece of work of its own: those that are there already, whole, are not encoded again.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.artefacts import require_disk_space
from calm_core.autoencoder import Autoencoder
from calm_core.finished_files import FinishedFiles
from calm_core.latent_files import SHARD_PATCHES, latent_bytes, posterior_shard, save_index, shard_name
from calm_core.patch_index import PatchIndex, scratch_bytes
from calm_core.precision import Precision, autocast
from calm_core.progress import Advance, progress
from calm_core.token_files import TokenStream

ENCODING_BATCH = 4096


class EncodedCorpus(NamedTuple):
    """How many patches the split has, and how many distinct ones."""

    patches: int
    distinct: int


@torch.no_grad()
def encode_corpus(
    model: Autoencoder, tokens: TokenStream, folder: Path, precision: Precision, kept: FinishedFiles | None = None
) -> EncodedCorpus:
    """Write the latents of ``tokens`` into ``folder``, as ``latent_files`` describes them, in bounded memory.

    It goes on from the shards that an earlier, interrupted call with the same model and tokens left in ``kept``.

    Raises:
        CalmError: the file system has not enough room for them.
    """
    if kept is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return encode_corpus(model, tokens, folder, precision, FinishedFiles(Path(scratch), "encode_corpus"))
    patch_size, latent_size = model.config.patch_size, model.config.latent_size
    patches = len(tokens) // patch_size
    require_disk_space(folder, scratch_bytes(patches, patch_size), "the latents")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, PatchIndex(tokens, patch_size, Path(scratch)) as index:
        shards = -(-index.distinct // SHARD_PATCHES)
        digests = {shard: digest for shard in range(shards) if (digest := kept.find(shard_name(shard)))}
        there = sum(kept.size(shard_name(shard), digest) for shard, digest in digests.items())
        require_disk_space(folder, latent_bytes(index.distinct, patches, latent_size) - there, "the latents")
        if digests:
            kept.tell(f"goes on after {len(digests)} of {shards} shards")
        done = sum(min(SHARD_PATCHES, index.distinct - shard * SHARD_PATCHES) for shard in digests)
        with progress("encode corpus", index.distinct, "patches", done) as advance, kept.scratch() as fresh:
            missing = [shard for shard in range(shards) if shard not in digests]
            with autocast(precision, torch.device("cpu")):
                token_states = _token_states(model)
                for shard in missing:
                    _encode_shard(model, token_states, index, shard, fresh, advance)
                    digests[shard] = kept.keep(fresh / shard_name(shard))
        for shard, digest in digests.items():
            kept.put(shard_name(shard), digest, folder)
        save_index(index.numbers(), patches, index.distinct, folder)
        return EncodedCorpus(patches, index.distinct)


def _encode_shard(
    model: Autoencoder, token_states: Tensor, index: PatchIndex, shard: int, folder: Path, advance: Advance
) -> None:
    """Write shard number ``shard`` of the posteriors into ``folder``."""
    start = shard * SHARD_PATCHES
    count = min(SHARD_PATCHES, index.distinct - start)
    with posterior_shard(shard, count, model.config.latent_size, folder) as file:
        for row in range(0, count, ENCODING_BATCH):
            batch = index.distinct_patches(start + row, min(ENCODING_BATCH, count - row))
            posterior = model.encoder.posterior(F.embedding(batch, token_states))
            file.write("mean", row, posterior.mean.half().numpy())
            file.write("log_std", row, posterior.log_std.half().numpy())
            advance(len(batch))


def _token_states(model: Autoencoder) -> Tensor:
    """The first half of the encoder for the whole vocabulary, [vocabulary, hidden] float32.

    It looks at one token at a time, so a lookup does in each patch what would be most of the work.
    """
    token_ids = torch.arange(model.config.vocabulary_size)
    return torch.cat([model.encoder.token_states(batch).float() for batch in token_ids.split(ENCODING_BATCH)])
