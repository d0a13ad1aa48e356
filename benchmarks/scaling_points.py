"""What ``scaling`` measures: the time a token of each kind of work, at one place of one axis.

The models are those of params.yaml but for what is varied, for AdamW (Muon's own work would hide the models' at so few
tokens a step) and for the batch: a training step has as many tokens at every point.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.default_steps import calm_step, transformer_step
from benchmarks.measure import seconds_of
from benchmarks.synthetic_text import synthetic_documents
from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.training import autoencoder_config
from calm_core.corpus.tokenise import tokenise
from calm_core.costs.flops import calm_flops, transformer_flops
from calm_core.inference.decoding import Prompts, Sampling, Step, calm_steps, transformer_steps
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus
from calm_core.params import LanguageModelParams, Params
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices

CONTEXT_AXIS, PATCH_AXIS, WIDTH_AXIS, CORPUS_AXIS = "context, tokens", "K, tokens a patch", "width", "corpus, tokens"
STEP_TOKENS, CONTEXT = 1024, 256
"""Tokens of a training step, and of a sequence where the context is not what varies."""
GENERATED_TOKENS, GENERATED_SEQUENCES = 32, 8
READ_BATCHES = 16


class Point(NamedTuple):
    """One place of one curve; ``seconds`` measures the time a token once."""

    axis: str
    curve: str
    x: int
    seconds: Callable[[], float]
    flops: float | None = None
    """Counted, a token."""


def model_points(params: Params, axis: str, places: Sequence[int]) -> Iterator[Point]:
    """Training and generation of both models at ``places`` of the context, K or width axis; K is CALM's alone."""
    for x in places:
        changed = _changed(params, axis, x)
        yield from _calm_points(axis, x, changed)
        if axis != PATCH_AXIS:
            yield from _transformer_points(axis, x, changed)


def corpus_points(params: Params, folder: Path, sizes: Sequence[int]) -> Iterator[Point]:
    """Tokenising, encoding and reading synthetic corpora of as many documents as ``sizes`` says, kept in ``folder``."""
    documents, tokenizer = synthetic_documents(max(sizes)), params.tokenizer
    for size in sizes:
        text, tokens, latents, scratch = (
            folder / f"{size}-{name}" for name in ("text.txt", "tokens", "latents", "scratch")
        )
        for path in (tokens, latents, scratch):
            path.mkdir()
        text.write_text("\n".join(documents[:size]), encoding="utf-8")
        source = {"source": "files", "paths": [str(text)], "text_unit": "line", "documents": None}
        params = params.model_copy(update={"corpus": params.corpus.model_copy(update=source), "tokenizer": tokenizer})
        with redirect_stderr(StringIO()):
            vocabulary_size = tokenise(params, tokens)["vocabulary_size"]
        # Trained once, on the first corpus: the tokenizer's training does not grow with the corpus.
        trained = {"path": str(tokens / "tokenizer.json"), "vocabulary_size": vocabulary_size}
        tokenizer = tokenizer.model_copy(update=trained)
        params = params.model_copy(update={"tokenizer": tokenizer})
        autoencoder = Autoencoder(autoencoder_config(params.autoencoder, vocabulary_size))
        autoencoder.initialise(generator(0, "scaling"))
        stream, precision = TokenStream(tokens, "train"), params.runtime.precision
        with redirect_stderr(StringIO()):
            encode_corpus(autoencoder, stream, latents, precision)
        encoding = partial(encode_corpus, autoencoder, stream, scratch, precision)
        reading = _reading(stream, LatentCorpus(latents), params.autoencoder.patch_size)
        length = len(stream)
        yield Point(CORPUS_AXIS, "tokenise", length, _per_token(partial(tokenise, params, scratch), length))
        yield Point(CORPUS_AXIS, "encode", length, _per_token(encoding, length))
        yield Point(CORPUS_AXIS, "reading batches", length, _per_token(reading, READ_BATCHES * STEP_TOKENS))


def choosing_points(sizes: Sequence[int]) -> Iterator[Point]:
    """Choosing a training batch, without reading it, out of as many blocks of ``CONTEXT`` tokens as ``sizes`` says."""
    for size in sizes:
        choosing = partial(batch_indices, 0, STEP_TOKENS // CONTEXT, size, 0, "scaling")
        timed = _per_token(choosing, STEP_TOKENS)

        # The first batch of an epoch draws its order, which the other points have driven out of memory since.
        def later_batch(choosing: Callable[[], object] = choosing, timed: Callable[[], float] = timed) -> float:
            choosing()
            return timed()

        yield Point(CORPUS_AXIS, "choosing a batch", size * CONTEXT, later_batch)


def _changed(params: Params, axis: str, x: int) -> Params:
    context = x if axis == CONTEXT_AXIS else CONTEXT
    shape: dict[str, Any] = {"context_tokens": context, "batch_sequences": STEP_TOKENS // context, "optimiser": "adamw"}
    if axis == WIDTH_AXIS:
        heads = max(1, x // 32)
        shape |= {"hidden_size": x, "intermediate_size": 8 * x // 3, "heads": heads, "key_value_heads": heads}
    changes: dict[str, Any] = {name: getattr(params, name).model_copy(update=shape) for name in ("calm", "transformer")}
    if axis == PATCH_AXIS:
        changes["autoencoder"] = params.autoencoder.model_copy(update={"patch_size": x})
    return params.model_copy(update=changes)


def _calm_points(axis: str, x: int, params: Params) -> Iterator[Point]:
    section, step = params.calm, calm_step(params)
    coder, objective, draws = step.autoencoder.config, step.objective, generator(0, "scaling")

    def start() -> Iterator[Step]:
        return calm_steps(step.model, step.autoencoder, _prompts(section, coder.vocabulary_size), Sampling(), draws)

    patches = section.context_tokens // coder.patch_size
    scored_targets = objective.scored_targets if objective.spaces else 0
    flops = calm_flops(step.model.config, coder, patches, section.samples, scored_targets)
    generation = _generation(start, GENERATED_TOKENS // coder.patch_size)
    yield Point(axis, "CALM, training", x, _training(step.run, section), flops.training_per_token)
    yield Point(axis, "CALM, generation", x, generation, flops.inference_per_token)


def _transformer_points(axis: str, x: int, params: Params) -> Iterator[Point]:
    section, step, draws = params.transformer, transformer_step(params), generator(0, "scaling")

    def start() -> Iterator[Step]:
        prompts = _prompts(section, params.tokenizer.vocabulary_size)
        return transformer_steps(step.model, prompts, Sampling(), draws)

    flops = transformer_flops(step.model.config, section.context_tokens)
    yield Point(axis, "Transformer, training", x, _training(step.run, section), flops.training_per_token)
    yield Point(axis, "Transformer, generation", x, _generation(start, GENERATED_TOKENS), flops.inference_per_token)


def _training(step: Callable[[], None], section: LanguageModelParams) -> Callable[[], float]:
    return _per_token(step, section.batch_sequences * section.context_tokens)


def _generation(start: Callable[[], Iterator[Step]], steps: int) -> Callable[[], float]:
    def seconds() -> float:
        running = start()
        next(running)  # reads the prompt
        return seconds_of(lambda: list(islice(running, steps))) / (GENERATED_TOKENS * GENERATED_SEQUENCES)

    return seconds


def _prompts(section: LanguageModelParams, vocabulary_size: int) -> Prompts:
    """Prompts that the generated tokens fill up to the context."""
    shape = (GENERATED_SEQUENCES, section.context_tokens - GENERATED_TOKENS)
    token_ids = torch.randint(vocabulary_size, shape, generator=generator(0, "scaling"))
    return Prompts(token_ids, torch.zeros(GENERATED_SEQUENCES, dtype=torch.int64))


def _reading(stream: TokenStream, latents: LatentCorpus, patch_size: int) -> Callable[[], None]:
    patches, steps = CONTEXT // patch_size, count()
    blocks = (len(latents) - 1) // patches

    def read() -> None:
        for step in islice(steps, READ_BATCHES):
            starts = batch_indices(step, STEP_TOKENS // CONTEXT, blocks, 0, "scaling") * patches
            stream.windows(starts * patch_size, CONTEXT)
            latents.posterior(starts[:, None] + torch.arange(1, patches + 1))

    return read


def _per_token(work: Callable[[], object], tokens: int) -> Callable[[], float]:
    def seconds() -> float:
        with redirect_stderr(StringIO()):  # the work's own progress
            return seconds_of(work) / tokens

    return seconds
