"""BrierLM of all positions at once against the estimator position by position, with a cache, one sequence at a time.

Speed does not depend on what weights hold, so they are random, but scaled until samples often repeat; the 64
documents are the model's own text. Both ways then give scores well away from zero, which must agree.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.measure import Result, median_ratio, medians, seconds_of
from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.evaluation.brier import brier_from_probabilities, brier_from_samples
from calm_core.evaluation.continuations import calm_continuations, sample_tokens, transformer_brier
from calm_core.inference.decoding import Sampling, Step, align_prompts, calm_steps, transformer_steps
from calm_core.nn.backbone import BackboneConfig, KeyValueCache
from calm_core.tokens.blocks import MAX_TOKENS
from calm_core.transformer.model import Transformer, TransformerConfig

DOCUMENTS, CONTEXT, SAMPLES, BATCH = 64, 64, 2, 16
VOCABULARY = 4096
BACKBONE = BackboneConfig(128, 344, 4, 4, 4)


@torch.no_grad()
def brierlm() -> list[Result]:
    """The Transformer, and CALM at K 1 and K 2."""
    generator = torch.Generator().manual_seed(0)
    return [transformer_result(generator), calm_result(1, generator), calm_result(2, generator)]


def transformer_result(generator: torch.Generator) -> Result:
    """Both ways on a Transformer, after every token."""
    model = Transformer(TransformerConfig(VOCABULARY, BACKBONE))
    model.initialise(generator)
    model.output.weight.mul_(5)
    prompts = align_prompts([[index] for index in range(DOCUMENTS)], 1, 0)
    text = _text(prompts.token_ids, transformer_steps(model, prompts, Sampling(), generator))

    def at_once() -> Tensor:
        leaves = torch.arange(CONTEXT)
        return torch.cat([transformer_brier(model, some, leaves, SAMPLES, generator) for some in text.split(BATCH)])

    def by_position() -> Tensor:
        scores = []
        for document in text:
            cache = model.backbone.new_cache()
            for position in range(CONTEXT):
                log_probabilities = model(document[None, position : position + 1], cache)[:, -1].log_softmax(dim=-1)
                scores.append(
                    _transformer_position(model, cache, log_probabilities, document[position + 1 :], generator)
                )
        return torch.stack(scores)

    return _compared("BrierLM of the Transformer", at_once, by_position)


def calm_result(patch_size: int, generator: torch.Generator) -> Result:
    """Both ways on a CALM, after every patch."""
    autoencoder = Autoencoder(AutoencoderConfig(VOCABULARY, patch_size, 96, 192, 64))
    autoencoder.initialise(generator)
    model = Calm(CalmConfig(VOCABULARY, patch_size, 64, BACKBONE, EnergyHeadConfig(2)))
    model.initialise(generator)
    last = model.latent_head.output[-1]  # type: ignore[attr-defined]
    last.weight.normal_(0.0, 0.03, generator=generator)
    last.bias.normal_(0.0, 1.0, generator=generator)
    prompts = align_prompts([[index] * patch_size for index in range(DOCUMENTS)], patch_size, 0)
    text = _text(prompts.token_ids, calm_steps(model, autoencoder, prompts, Sampling(), generator))
    patches = text[:, :CONTEXT].unflatten(-1, (-1, patch_size))
    targets = text[:, patch_size:].unfold(1, MAX_TOKENS, patch_size)[:, : patches.shape[1]]

    def at_once() -> Tensor:
        scores = []
        for some, following in zip(patches.split(BATCH), targets.split(BATCH), strict=True):
            samples = calm_continuations(model, autoencoder, some, MAX_TOKENS, SAMPLES, generator)
            scores.append(brier_from_samples(samples, following))
        return torch.cat(scores)

    def by_position() -> Tensor:
        scores = []
        for document, following in zip(patches, targets, strict=True):
            cache = model.backbone.new_cache()
            for position, patch in enumerate(document):
                hidden_states = model(patch[None, None], cache)[:, -1]
                samples = _calm_position(model, autoencoder, cache, hidden_states, generator)
                scores.append(brier_from_samples(samples, following[position]))
        return torch.stack(scores)

    return _compared(f"BrierLM of CALM, K {patch_size}", at_once, by_position)


def _transformer_position(
    model: Transformer, cache: KeyValueCache, log_probabilities: Tensor, following: Tensor, generator: torch.Generator
) -> Tensor:
    """Brier-1 to Brier-4 of one position, [4], from log-probabilities [1, vocabulary] of its next token."""
    of_target = log_probabilities[0, following[0]]
    true = model(following[None, : MAX_TOKENS - 1], cache.repeat(1)).log_softmax(dim=-1)[0]
    of_others = true.gather(-1, following[1:MAX_TOKENS, None]).squeeze(-1)
    branch, log_probabilities = cache.repeat(SAMPLES), log_probabilities.repeat(SAMPLES, 1)
    prefix = torch.zeros(SAMPLES)
    prefixes, collisions = [prefix], [log_probabilities.exp().square().sum(dim=-1)]
    for _ in range(1, MAX_TOKENS):
        drawn = sample_tokens(log_probabilities, generator)[:, None]
        prefix = prefix + log_probabilities.gather(-1, drawn).squeeze(-1)
        log_probabilities = model(drawn, branch)[:, -1].log_softmax(dim=-1)
        prefixes.append(prefix)
        collisions.append(log_probabilities.exp().square().sum(dim=-1))
    targets = torch.cat([of_target[None], of_others])
    return brier_from_probabilities(targets, torch.stack(prefixes, dim=-1), torch.stack(collisions, dim=-1))


def _calm_position(
    model: Calm, autoencoder: Autoencoder, cache: KeyValueCache, hidden_states: Tensor, generator: torch.Generator
) -> Tensor:
    """Samples [SAMPLES, 4] of what follows one position with ``hidden_states`` [1, hidden]."""
    branch, hidden_states = cache.repeat(SAMPLES), hidden_states.repeat(SAMPLES, 1)
    drawn: list[Tensor] = []
    while len(drawn) * model.config.patch_size < MAX_TOKENS:
        if drawn:
            hidden_states = model(drawn[-1][:, None], branch)[:, -1]
        head = model.latent_head
        latents = head.sample(hidden_states, head.sampling_draws((SAMPLES,), generator))
        drawn.append(autoencoder.decode(latents))
    return torch.cat(drawn, dim=-1)[:, :MAX_TOKENS]


def _text(prompts: Tensor, steps: Iterator[Step]) -> Tensor:
    """Documents [documents, CONTEXT + 4] that begin with ``prompts`` and that the model goes on with."""
    pieces, length = [prompts], prompts.shape[1]
    while length < CONTEXT + MAX_TOKENS:
        pieces.append(next(steps).token_ids)
        length += pieces[-1].shape[1]
    return torch.cat(pieces, dim=1)[:, : CONTEXT + MAX_TOKENS]


def _compared(name: str, at_once: Callable[[], Tensor], by_position: Callable[[], Tensor]) -> Result:
    scores: dict[str, Tensor] = {}

    def slow() -> None:
        scores["by position"] = by_position().flatten(0, -2).double()

    def fast() -> None:
        scores["at once"] = at_once().flatten(0, -2).double()

    # One round, and only the fast side warms up: position by position takes a minute a model, and the goal is far from
    # what noise could reach.
    fast()
    pairs = [(seconds_of(slow), seconds_of(fast))]
    means = {kind: score.mean(dim=0) for kind, score in scores.items()}
    error = sum(score.var(dim=0) / len(score) for score in scores.values())
    assert isinstance(error, Tensor)
    difference = (means["at once"] - means["by position"]).abs() / error.sqrt()
    by_position_seconds, seconds = medians(pairs)
    details = {
        "seconds": seconds,
        "by_position_seconds": by_position_seconds,
        "positions": len(scores["at once"]),
        "brier": means["at once"].tolist(),
        "by_position_brier": means["by position"].tolist(),
        "largest_difference_in_standard_errors": float(difference.max()),
    }
    ratio = median_ratio(pairs)
    return Result(name, "position by position, with a cache", ratio, "times as fast", ">=", 20, details)
