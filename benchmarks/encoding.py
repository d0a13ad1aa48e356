"""encode_corpus against the encoder run over every patch of the corpus, in the same batches and into the same files.

Natural text repeats its patches. The stage encodes each distinct one once, so it should save at least their share,
although it must find them first.
"""

from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import torch

from benchmarks.default_corpus import default_corpus
from benchmarks.measure import Result, alternately, median_ratio, medians
from calm_core.autoencoder.model import Autoencoder
from calm_core.latents.encode import ENCODING_BATCH, EncodedCorpus, encode_corpus
from calm_core.latents.shards import SHARD_PATCHES, posterior_shard
from calm_core.params import load_params
from calm_core.runtime.precision import Precision, autocast
from calm_core.tokens.shards import TokenStream

ROUNDS = 3


def encoding() -> list[Result]:
    """The training split of the default corpus."""
    with default_corpus(load_params()) as corpus:
        precision, scratch = corpus.params.runtime.precision, corpus.folder / "scratch"
        scratch.mkdir()
        every = partial(encode_every_patch, corpus.autoencoder, corpus.train, scratch, precision)
        counts: list[EncodedCorpus] = []

        def stage() -> None:
            with redirect_stderr(StringIO()):
                counts.append(encode_corpus(corpus.autoencoder, corpus.train, scratch, precision))

        pairs = alternately(every, stage, ROUNDS)
    every_seconds, seconds = medians(pairs)
    patches, distinct = counts[-1]
    details = {
        "patches": patches,
        "distinct_patches": distinct,
        "seconds": seconds,
        "every_patch_seconds": every_seconds,
    }
    yardstick, goal = "the encoder over every patch", patches / distinct
    return [Result("encode_corpus stage", yardstick, median_ratio(pairs), "times as fast", ">=", goal, details)]


@torch.no_grad()
def encode_every_patch(model: Autoencoder, tokens: TokenStream, folder: Path, precision: Precision) -> None:
    """Write the posterior of each patch of ``tokens``, copies too, into ``folder``."""
    size = model.config.patch_size
    patches = len(tokens) // size
    with autocast(precision, torch.device("cpu")):
        for shard, start in enumerate(range(0, patches, SHARD_PATCHES)):
            count = min(SHARD_PATCHES, patches - start)
            with posterior_shard(shard, count, model.config.latent_size, folder) as file:
                for row in range(0, count, ENCODING_BATCH):
                    batch = tokens.slice((start + row) * size, min(ENCODING_BATCH, count - row) * size).view(-1, size)
                    posterior = model.encode(batch)
                    file.write("mean", row, posterior.mean.half().numpy())
                    file.write("log_std", row, posterior.log_std.half().numpy())
