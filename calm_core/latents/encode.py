"""Encoding the corpus: the posterior of every distinct patch of the training split, once.

Training draws a position's targets from here, instead of running the frozen encoder at each step of each epoch. Shards
of posteriors are kept one by one, so that an interrupted encoding resumes after the last finished shard.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, Posterior
from calm_core.latents.distinct_patches import PatchIndex, map_distinct_patches, scratch_bytes
from calm_core.latents.shards import SHARD_PATCHES, latent_bytes, posterior_shard, save_index, shard_name
from calm_core.runtime.device import device_of
from calm_core.runtime.precision import Precision, autocast
from calm_core.runtime.process_group import ALONE, ProcessGroup
from calm_core.runtime.progress import progress
from calm_core.runtime.threads import side_by_side
from calm_core.storage.disk_space import require_disk_space
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.shards import TokenStream

ENCODING_BATCH = 4096


class EncodedCorpus(NamedTuple):
    """How many patches the split has, and how many distinct ones."""

    patches: int
    distinct: int


@torch.no_grad()
def encode_corpus(
    model: Autoencoder,
    tokens: TokenStream,
    folder: Path,
    precision: Precision,
    kept: FinishedFiles | None = None,
    processes: ProcessGroup = ALONE,
) -> EncodedCorpus:
    """Write the latents of ``tokens`` into ``folder``, in the format of ``latents.shards``, in bounded memory.

    Works on the device of ``model``. Resumes from the shards that an interrupted call with the same model and tokens
    left in ``kept``. The other ``processes``, which need ``kept``, call ``help_to_encode``.

    Raises:
        CalmError: the file system has too little free space.
    """
    if kept is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return encode_corpus(model, tokens, folder, precision, FinishedFiles(Path(scratch), "encode_corpus"))
    patch_size, latent_size = model.config.patch_size, model.config.latent_size
    patches = len(tokens) // patch_size
    # Latents are checked below, when the number of distinct patches is known.
    require_disk_space(folder, scratch_bytes(patches, patch_size), "the latents")
    with tempfile.TemporaryDirectory(dir=folder) as scratch, PatchIndex(tokens, patch_size, Path(scratch)) as index:
        shards = -(-index.distinct // SHARD_PATCHES)
        digests = {shard: digest for shard in range(shards) if (digest := kept.find(shard_name(shard)))}
        there = sum(kept.size(shard_name(shard), digest) for shard, digest in digests.items())
        require_disk_space(folder, latent_bytes(index.distinct, patches, latent_size) - there, "the latents")
        if digests:
            kept.tell(f"goes on after {len(digests)} of {shards} shards")
        missing = [shard for shard in range(shards) if shard not in digests]
        # Others map the patches from the scratch folder, so it stays until the barrier.
        work = processes.broadcast_object(_Work(index.path, index.distinct, missing))
        digests |= _encode_share(model, work, precision, kept, processes)
        processes.barrier()
        for shard in range(shards):
            # Shards of other processes are found by name: their hashes were not gathered.
            digest = digests.get(shard) or kept.find(shard_name(shard))
            assert digest is not None
            kept.put(shard_name(shard), digest, folder)
        save_index(index.numbers(), patches, index.distinct, folder)
        return EncodedCorpus(patches, index.distinct)


@torch.no_grad()
def help_to_encode(model: Autoencoder, precision: Precision, kept: FinishedFiles, processes: ProcessGroup) -> None:
    """Encode this process's share of the shards, while the first of ``processes`` runs ``encode_corpus``."""
    work = processes.broadcast_object(_Work(Path(), 0, []))
    _encode_share(model, work, precision, kept, processes)
    processes.barrier()


class _Work(NamedTuple):
    """Which shards are to be encoded, and the file of all ``distinct`` patches."""

    patches: Path
    distinct: int
    shards: list[int]


def _encode_share(
    model: Autoencoder, work: _Work, precision: Precision, kept: FinishedFiles, processes: ProcessGroup
) -> dict[int, str]:
    """Encode and keep every ``processes.count``-th shard of ``work``; SHA-256 by shard."""
    # Whole shards, so that no file has two writers.
    shards = work.shards[processes.rank :: processes.count]
    total = sum(len(_rows(shard, work.distinct)) for shard in shards)
    digests, device = {}, device_of(model)
    with (
        progress("encode corpus", total, "patches")
        if processes.is_first
        else nullcontext(lambda done: None) as advance,
        kept.scratch(processes.rank) as fresh,
    ):
        patches = map_distinct_patches(work.patches)
        with autocast(precision, device):
            token_states = _token_states(model)

        def encode(rows: range) -> Posterior:
            # A copy, since the mapping is read-only and torch wants writable memory.
            batch = torch.from_numpy(patches[rows.start : rows.stop].copy()).long().to(device)
            with autocast(precision, device):
                posterior = model.encoder.posterior(F.embedding(batch, token_states))
            # Float16: half the disk and memory, with a rounding far below the posterior's std (latents/shards.py).
            return Posterior(*(values.half().cpu() for values in posterior))

        for shard in shards:
            rows = _rows(shard, work.distinct)
            batches = (rows[first : first + ENCODING_BATCH] for first in range(0, len(rows), ENCODING_BATCH))
            with posterior_shard(shard, len(rows), model.config.latent_size, fresh) as file:
                first = 0
                for mean, log_std in side_by_side(encode, batches, device, model):
                    file.write("mean", first, mean.numpy())
                    file.write("log_std", first, log_std.numpy())
                    first += len(mean)
                    advance(len(mean))
            digests[shard] = kept.keep(fresh / shard_name(shard))
    return digests


def _rows(shard: int, distinct: int) -> range:
    """Which of the ``distinct`` patches shard number ``shard`` holds."""
    return range(shard * SHARD_PATCHES, min((shard + 1) * SHARD_PATCHES, distinct))


def _token_states(model: Autoencoder) -> Tensor:
    """The first half of the encoder for the whole vocabulary, [vocabulary, hidden] float32.

    These layers see one token at a time, so a table lookup replaces most of the work of each patch.
    """
    token_ids = torch.arange(model.config.vocabulary_size, device=device_of(model))
    return torch.cat([model.encoder.token_states(batch).float() for batch in token_ids.split(ENCODING_BATCH)])
