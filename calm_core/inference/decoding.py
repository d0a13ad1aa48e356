"""Text from a trained model, a key/value cache behind it: one patch a step for CALM, one token for the Transformer.

Notable:
- prompts of different lengths go together: shorter ones start later, behind positions that nothing looks at. Only the
  distance between positions enters attention (rotary embeddings), so the shift changes nothing;
- a prompt is the start of a document, and begins in the middle of its first patch unless its length is a multiple of
  K, as documents do in training. Before it stands what stood there in training, the end of another document: the
  model's ``opening``, if its folder names one;
- on a CPU a step is made as suits the size of the model (``_made_fast``);
- a text ends at the end-of-text token, in the middle of a patch too, or at the length asked for;
- below temperature 1 CALM chooses among samples (``temperature``), counting equal ones by ``equal_patches``, or draws
  from the decoder's softmax (``softmax_temperature``); the Transformer has probabilities to sharpen, a
  token at a time, and so has a CALM with a token head.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.head import Head
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.continuations import sample_tokens
from calm_core.inference.backbone_step import BackboneStep
from calm_core.inference.equal_patches import CANDIDATES_AT_ONCE, candidates
from calm_core.inference.few_rows import products_of_few_rows
from calm_core.inference.patch_writer import PatchWriter
from calm_core.inference.softmax_temperature import softmax_temperature
from calm_core.inference.temperature import TemperatureSample, batch_choice, exact_temperature
from calm_core.nn.block_sizes import rows_at_once
from calm_core.runtime.device import device_of
from calm_core.runtime.row_generators import Generators
from calm_core.runtime.threads import operators_of_one_thread, threads_side_by_side
from calm_core.transformer.model import Transformer

PATCHES_AT_ONCE = 4096
"""About how many candidate patches are sampled and decoded together, which bounds the memory that they take."""

ROW_PATCHES_AT_ONCE = 256
"""Candidate patches for which a row with a generator of its own draws at once: together the same, at batch 16."""

STEPS_AT_ONCE = 8
"""Steps for which such a row draws at once at temperature 1: a draw for each row takes longer than one for all."""

LEAST_TEMPERATURE = 1e-30
"""Of logits that are divided by it: no lower one is closer to the likeliest token, and float32 would overflow."""

LATENTS_LOGITS = 1 << 18
"""Logits of the softmax sampler that are there together on a CPU: several passes over them stay in its cache."""

SamplerName = Literal["batch", "exact", "softmax"]
"""The paper's two algorithms, on patches of most probable tokens; and that for tokens drawn from the decoder's softmax,
which are another model's at every temperature (``softmax_temperature``)."""


@dataclass(frozen=True)
class Sampling:
    """How the next patch or token is chosen; ``sampler`` and what follows it concern a CALM that samples latents."""

    temperature: float = 1.0
    sampler: SamplerName = "batch"
    draws: int = 200
    """N: samples that the batch approximation chooses from (the paper's number)."""
    budget: int = 20_000
    """Most samples a patch for the exact sampler, before the batch approximation steps in."""
    latents: int = 32
    """M: latents a patch for the softmax sampler below temperature 1."""


class Step(NamedTuple):
    """One step of generation: new token ids [batch, K], and for each row how it came about, [batch]."""

    token_ids: Tensor
    draws: Tensor
    finished: Tensor
    """False where a temperature below 1 was approximated."""
    exact: bool
    """Whether the rest is from P^(1 / temperature) itself (``TemperatureSample``)."""
    reached: Tensor
    """False where it was approximated by a higher temperature."""


class Prompts(NamedTuple):
    """Token ids [batch, whole patches * K] int64, and how many patches at the start of each row are padding [batch]."""

    token_ids: Tensor
    padding: Tensor


def align_prompts(prompts: list[list[int]], patch_size: int, filler: int, opening: Sequence[int] = ()) -> Prompts:
    """Prompts of any lengths, 0 included, as one batch on the CPU; the last token of each ends the last patch.

    Before each stand the last 1 to K of the K tokens of ``opening``. Without one, ``filler`` tokens, such as the end of
    a text, fill a first patch that the prompt leaves open, and stand there alone if it is empty.
    """
    least = 1 if opening else 0
    lengths = [max(1, -(-(len(prompt) + least) // patch_size)) for prompt in prompts]
    width = max(lengths) * patch_size
    rows = []
    for prompt, length in zip(prompts, lengths, strict=True):
        before = (opening or [filler] * patch_size)[patch_size - length * patch_size + len(prompt) :]
        # Padding on the left: the next patch then stands at the same place in every row.
        rows.append([filler] * (width - length * patch_size) + [*before, *prompt])
    return Prompts(torch.tensor(rows), torch.tensor([max(lengths) - length for length in lengths]))


def calm_steps(
    model: Calm, autoencoder: Autoencoder | None, prompts: Prompts, sampling: Sampling, generator: Generators
) -> Iterator[Step]:
    """Continue ``prompts`` patch by patch, without end; they, the models and the generator are on one device.

    A model with a token head comes without ``autoencoder``.
    """
    models = [part for part in (model, autoencoder) if part is not None]
    steps = _calm_steps(model, autoencoder, prompts, sampling, generator)
    sharpened = sampling.temperature != 1 and not isinstance(model.head, TokenHead)
    # Threads share the samples of several texts (``candidates``), and nothing else that is worth it.
    shared = sampling.sampler == "batch" and sampling.draws * len(prompts.token_ids) > CANDIDATES_AT_ONCE
    return _made_fast(steps, models, by_all_threads=sharpened and shared)


@torch.no_grad()
def _calm_steps(
    model: Calm, autoencoder: Autoencoder | None, prompts: Prompts, sampling: Sampling, generator: Generators
) -> Iterator[Step]:
    once = torch.ones(len(prompts.token_ids), dtype=torch.int64, device=prompts.token_ids.device)
    prompts, texts = _different(prompts)
    cache = model.backbone.new_cache()
    patches = prompts.token_ids.unflatten(-1, (-1, model.config.patch_size))
    padding = _any_padding(prompts)
    hidden_states = model(model.inputs(patches, autoencoder), cache, mask=_mask(padding, patches.shape[1]))[:, -1]
    hidden_states, read = hidden_states.repeat(texts, 1), patches[:, -1].repeat(texts, 1)
    step = BackboneStep(model.backbone, cache if texts == 1 else cache.repeat(texts), padding)
    write = PatchWriter(model.head) if isinstance(model.head, TokenHead) else None
    noise: Iterator[Tensor] | None = None
    while True:
        latents: Tensor | None = None
        if write is not None:
            token_ids = write(hidden_states, read, max(sampling.temperature, LEAST_TEMPERATURE), generator)
            chosen = TemperatureSample(token_ids, once, once.bool(), exact=True, reached=once.bool())
        elif sampling.temperature == 1 and sampling.sampler != "softmax":
            assert autoencoder is not None
            noise = noise or _noise_of_steps(model.latent_head, len(once), generator)
            latents = model.latent_head.sample(hidden_states, next(noise))
            chosen = TemperatureSample(autoencoder.decode(latents), once, once.bool(), exact=True, reached=once.bool())
        else:
            assert autoencoder is not None
            chosen = _sharpened(model, autoencoder, hidden_states, sampling, generator)
        yield Step(*chosen)
        read = chosen.symbols
        # A model that is fed latents gets those that the patch was decoded from, where they are known.
        hidden_states = step(model.patch_embedding(model.inputs(read, autoencoder, latents)))


def transformer_steps(
    model: Transformer, prompts: Prompts, sampling: Sampling, generator: Generators
) -> Iterator[Step]:
    """Continue ``prompts`` (K = 1) token by token, without end, from P^(1 / temperature); as ``calm_steps``."""
    return _made_fast(_transformer_steps(model, prompts, sampling, generator), [model], by_all_threads=False)


@torch.no_grad()
def _transformer_steps(
    model: Transformer, prompts: Prompts, sampling: Sampling, generator: Generators
) -> Iterator[Step]:
    once = torch.ones(len(prompts.token_ids), dtype=torch.int64, device=prompts.token_ids.device)
    prompts, texts = _different(prompts)
    cache, token_ids = model.backbone.new_cache(), prompts.token_ids
    padding = _any_padding(prompts)
    hidden_states = model.hidden_states(token_ids, cache, mask=_mask(padding, token_ids.shape[1]))[:, -1]
    hidden_states = hidden_states.repeat(texts, 1)
    step = BackboneStep(model.backbone, cache if texts == 1 else cache.repeat(texts), padding)
    while True:
        logits = model.output(hidden_states).float()
        written = sample_tokens((logits / max(sampling.temperature, LEAST_TEMPERATURE)).softmax(dim=-1), generator)
        yield Step(written[:, None], once, once.bool(), exact=True, reached=once.bool())
        hidden_states = step(model.embedding(written))


def _sharpened(
    model: Calm, autoencoder: Autoencoder, hidden_states: Tensor, sampling: Sampling, generator: Generators
) -> TemperatureSample:
    """A patch a row of ``hidden_states`` [batch, hidden] from P^(1 / temperature), a patch being one symbol."""

    head = model.latent_head

    def sampled(rows: Tensor, count: int) -> Iterator[Tensor]:
        for noise in _noise(head, rows, count, generator):
            yield head.sample(hidden_states[rows], noise)

    def draw(rows: Tensor, count: int) -> Tensor:
        return torch.cat([autoencoder.decode(latents) for latents in sampled(rows, count)])

    def logits(rows: Tensor, count: int) -> Tensor:
        return torch.cat([autoencoder.logits(latents) for latents in sampled(rows, count)])

    rows, temperature = len(hidden_states), sampling.temperature
    if sampling.sampler == "exact":
        budget, draws = sampling.budget, sampling.draws
        return exact_temperature(draw, rows, temperature, generator, budget=budget, fallback_draws=draws)
    numbers = torch.arange(rows, device=hidden_states.device)
    if sampling.sampler == "softmax":
        of_row = sampling.latents * autoencoder.config.patch_size * autoencoder.config.vocabulary_size
        at_once = rows_at_once(of_row, hidden_states.device, LATENTS_LOGITS)
        return softmax_temperature(logits, rows, temperature, generator, latents=sampling.latents, rows_at_once=at_once)
    # As ``batch_temperature`` does, but that only the chosen patches are decoded whole.
    noise = torch.cat(list(_noise(head, numbers, sampling.draws, generator)), dim=-3)
    latents, patches = candidates(head, autoencoder, hidden_states, noise)
    chosen, reached = batch_choice(patches[..., None], temperature, generator)
    used, never = torch.full_like(numbers, sampling.draws), torch.zeros_like(reached)
    return TemperatureSample(autoencoder.decode(latents[chosen, numbers]), used, never, exact=False, reached=reached)


def _noise_of_steps(head: Head, rows: int, generator: Generators) -> Iterator[Tensor]:
    """What ``head`` needs for a sample a row, step after step, without end."""
    while isinstance(generator, torch.Generator):
        yield head.sampling_draws((rows,), generator)
    while True:
        # Rows lie before the last dimension of what a head draws, and steps before those.
        yield from generator.drawn(lambda one: head.sampling_draws((STEPS_AT_ONCE, 1), one), -2).unbind(-3)


def _noise(head: Head, rows: Tensor, count: int, generator: Generators) -> Iterator[Tensor]:
    """What ``head`` needs for ``count`` samples of each of ``rows``, in parts for some of the samples."""
    at_once = max(1, PATCHES_AT_ONCE // len(rows))
    if isinstance(generator, torch.Generator):
        for first in range(0, count, at_once):
            yield head.sampling_draws((min(at_once, count - first), len(rows)), generator)
        return
    own = generator.of(rows)
    for first in range(0, count, ROW_PATCHES_AT_ONCE):
        # Not ``at_once``: how much a row draws in a call, on which its numbers may depend, is its own affair.
        shape = (min(ROW_PATCHES_AT_ONCE, count - first), 1)
        yield from own.drawn(partial(head.sampling_draws, shape), -2).split(at_once, dim=-3)


def _made_fast(steps: Iterator[Step], models: Sequence[nn.Module], by_all_threads: bool) -> Iterator[Step]:
    """``steps``, each made as it is fast on a CPU; who takes them is outside of what that needs.

    Operators of a small model have one thread each, unless told otherwise: a second one costs more than it gives.
    """
    small = threads_side_by_side(device_of(models[0]), *models) > 1 and not by_all_threads
    few_rows = nullcontext() if small else products_of_few_rows(models)
    while True:
        with operators_of_one_thread() if small else few_rows:
            step = next(steps, None)
        if step is None:
            return
        yield step


def _different(prompts: Prompts) -> tuple[Prompts, int]:
    """``prompts``, or the one that all of them are, to be read once; and how many texts follow each."""
    first, rows = prompts.token_ids[:1], len(prompts.token_ids)
    # Padding, too: what fills one row may be the text of another.
    if rows > 1 and (prompts.token_ids == first).all() and (prompts.padding == prompts.padding[0]).all():
        return Prompts(first, prompts.padding[:1]), rows
    return prompts, 1


def _any_padding(prompts: Prompts) -> Tensor | None:
    """The padding of ``prompts``, None if no row has any; asked once, since the answer makes a GPU's work wait."""
    return prompts.padding if prompts.padding.any() else None


def _mask(padding: Tensor | None, positions: int) -> Tensor | None:
    """Who sees whom among the positions of prompts, [batch, 1, positions, positions] bool; None where no row is padded:
    causal.

    A position of the padding sees itself alone, for a softmax over nothing has no value.
    """
    if padding is None:
        return None
    keys = torch.arange(positions, device=padding.device)
    queries = keys[:, None]
    visible = (keys <= queries) & (keys >= padding[:, None, None])
    return (visible | (keys == queries))[:, None]
