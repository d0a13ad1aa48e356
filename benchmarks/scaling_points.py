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
from torch import Tensor, nn

from benchmarks.measure import seconds_of
from calm_core.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm import Calm, CalmConfig
from calm_core.calm_training import head_objective
from calm_core.encoding import encode_corpus
from calm_core.flops import calm_flops, transformer_flops
from calm_core.generation import Prompts, Sampling, Step, calm_steps, transformer_steps
from calm_core.latent_files import LatentCorpus
from calm_core.optimiser import build_optimisers
from calm_core.params import LanguageModel, Params
from calm_core.precision import Precision, autocast
from calm_core.randomness import generator
from calm_core.token_files import TokenStream
from calm_core.tokenising import tokenise
from calm_core.training import batch_indices, training_step
from calm_core.transformer import Transformer, TransformerConfig, next_token_loss

CONTEXT_AXIS, PATCH_AXIS, WIDTH_AXIS, CORPUS_AXIS = "context, tokens", "K, tokens a patch", "width", "corpus, tokens"
STEP_TOKENS, CONTEXT = 1024, 256
"""Tokens of a training step, and of a sequence where the context is not what varies."""
GENERATED_TOKENS, GENERATED_SEQUENCES = 32, 8
READ_BATCHES = 16
WORDS, VOCABULARY = 100, 20_000
"""Words of a synthetic document, and words there are."""


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
    documents, tokenizer = _synthetic_documents(max(sizes)), params.tokenizer
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
        autoencoder = Autoencoder(AutoencoderConfig.from_params(params.autoencoder, vocabulary_size))
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
        yield Point(CORPUS_AXIS, "choosing a batch", size * CONTEXT, _per_token(choosing, STEP_TOKENS))


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
    draws, section = generator(0, "scaling"), params.calm
    coder = AutoencoderConfig.from_params(params.autoencoder, params.tokenizer.vocabulary_size)
    model, autoencoder = Calm(CalmConfig.from_params(section, coder)), Autoencoder(coder).requires_grad_(False)
    model.initialise(draws)
    autoencoder.initialise(draws)
    objective = head_objective(section, autoencoder)
    shape = (section.batch_sequences, section.context_tokens // coder.patch_size, coder.patch_size)
    patches = torch.randint(coder.vocabulary_size, shape, generator=draws)
    positions = shape[0] * shape[1]
    posterior = Posterior(*torch.zeros(2, positions, coder.latent_size))

    def loss() -> Tensor:
        hidden_states = model(model.inputs(patches, autoencoder)).flatten(0, 1)
        head_draws = model.head.training_draws(positions, objective, draws)
        return model.head.loss(hidden_states, posterior, head_draws, objective).total

    def start() -> Iterator[Step]:
        return calm_steps(model, autoencoder, _prompts(section, coder.vocabulary_size), Sampling(), draws)

    scored_targets = objective.scored_targets if objective.spaces else 0
    flops = calm_flops(model.config, coder, shape[1], section.samples, scored_targets)
    training = _training(model, loss, section, params.runtime.precision)
    generation = _generation(start, GENERATED_TOKENS // coder.patch_size)
    yield Point(axis, "CALM, training", x, training, flops.training_per_token)
    yield Point(axis, "CALM, generation", x, generation, flops.inference_per_token)


def _transformer_points(axis: str, x: int, params: Params) -> Iterator[Point]:
    draws, section, vocabulary_size = generator(0, "scaling"), params.transformer, params.tokenizer.vocabulary_size
    model = Transformer(TransformerConfig.from_params(section, vocabulary_size))
    model.initialise(draws)
    shape = (section.batch_sequences, section.context_tokens + 1)
    token_ids = torch.randint(vocabulary_size, shape, generator=draws)

    def start() -> Iterator[Step]:
        return transformer_steps(model, _prompts(section, vocabulary_size), Sampling(), draws)

    flops = transformer_flops(model.config, section.context_tokens)
    training = _training(model, lambda: next_token_loss(model, token_ids), section, params.runtime.precision)
    yield Point(axis, "Transformer, training", x, training, flops.training_per_token)
    yield Point(axis, "Transformer, generation", x, _generation(start, GENERATED_TOKENS), flops.inference_per_token)


def _training(
    model: nn.Module, loss: Callable[[], Tensor], section: LanguageModel, precision: Precision
) -> Callable[[], float]:
    optimisers = build_optimisers(model, section)

    def step() -> None:
        with autocast(precision, torch.device("cpu")):
            value = loss()
        training_step(model, optimisers, value, section.gradient_clip)

    return _per_token(step, section.batch_sequences * section.context_tokens)


def _generation(start: Callable[[], Iterator[Step]], steps: int) -> Callable[[], float]:
    def seconds() -> float:
        running = start()
        next(running)  # reads the prompt
        return seconds_of(lambda: list(islice(running, steps))) / (GENERATED_TOKENS * GENERATED_SEQUENCES)

    return seconds


def _prompts(section: LanguageModel, vocabulary_size: int) -> Prompts:
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


def _synthetic_documents(number: int) -> list[str]:
    """Documents of made-up words, the word of rank r drawn with a probability in proportion to 1 / r (Zipf's law)."""
    draws = generator(0, "scaling", "text")
    lengths = torch.randint(2, 11, (VOCABULARY,), generator=draws)
    letters = torch.randint(ord("a"), ord("z") + 1, (VOCABULARY, 10), generator=draws)
    words = ["".join(map(chr, row[:length])) for row, length in zip(letters.tolist(), lengths.tolist(), strict=True)]
    weights = 1 / torch.arange(1, VOCABULARY + 1)
    chosen = torch.multinomial(weights, number * WORDS, replacement=True, generator=draws).view(number, WORDS)
    return [" ".join(words[word] for word in row) for row in chosen.tolist()]
