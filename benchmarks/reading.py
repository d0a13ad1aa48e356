"""Reading a training batch against the step that it feeds: params.yaml's steps and batches, on the default corpus.

Reading is all that a step does before it can compute: choosing the batch, its token ids and, for a CALM that has
latents, the posteriors of the patches that follow. Files are in the system's cache, as they are once an epoch has
begun; a step comes between any two readings, so that the processor's caches are as a training leaves them.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from itertools import count

import torch

from benchmarks.default_corpus import DefaultCorpus, default_corpus
from benchmarks.default_steps import calm_step, transformer_step
from benchmarks.measure import Result, alternately, median_ratio, medians
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus
from calm_core.params import LanguageModelParams, load_params
from calm_core.training.batches import batch_indices

ROUNDS = 15


def reading_batches() -> list[Result]:
    """CALM's batch and the Transformer's."""
    with default_corpus(load_params()) as corpus:
        readings = [
            ("CALM", _calm_reading(corpus), calm_step(corpus.params).run),
            (
                "the Transformer",
                _tokens_reading(corpus, corpus.params.transformer, following=1),
                transformer_step(corpus.params).run,
            ),
        ]
        return [_compared(name, read, step) for name, read, step in readings]


def _compared(name: str, read: Callable[[], object], step: Callable[[], object]) -> Result:
    pairs = alternately(read, step, ROUNDS)
    seconds, step_seconds = medians(pairs)
    details = {"seconds": seconds, "step_seconds": step_seconds}
    title = f"reading a training batch of {name}"
    return Result(title, "the step that it feeds", median_ratio(pairs), "of the step", "<", 0.02, details)


def _calm_reading(corpus: DefaultCorpus) -> Callable[[], None]:
    section, seed, patch_size = corpus.params.calm, corpus.params.seed, corpus.params.autoencoder.patch_size
    if section.head == "tokens":
        return _tokens_reading(corpus, section, following=patch_size)
    latents = corpus.folder / "latents"
    latents.mkdir()
    with redirect_stderr(StringIO()):
        encode_corpus(corpus.autoencoder, corpus.train, latents, corpus.params.runtime.precision)
    posteriors, steps, context = LatentCorpus(latents), count(), section.context_tokens // patch_size
    blocks = (len(posteriors) - 1) // context

    def read() -> None:
        starts = batch_indices(next(steps), section.batch_sequences, blocks, seed, "benchmarks") * context
        corpus.train.windows(starts * patch_size, section.context_tokens)
        posteriors.posterior((starts[:, None] + torch.arange(1, context + 1)).flatten())

    return read


def _tokens_reading(corpus: DefaultCorpus, section: LanguageModelParams, following: int) -> Callable[[], None]:
    context, seed, steps = section.context_tokens, corpus.params.seed, count()
    blocks = (len(corpus.train) - following) // context

    def read() -> None:
        starts = batch_indices(next(steps), section.batch_sequences, blocks, seed, "benchmarks") * context
        corpus.train.windows(starts, context + following)

    return read
