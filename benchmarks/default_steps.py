"""Training steps of params.yaml's models as the stages take them, on random weights and one batch of random tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, Posterior
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.calm.training import calm_config, head_objective
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import LanguageModelParams, Params
from calm_core.runtime.precision import Precision, autocast
from calm_core.runtime.randomness import generator
from calm_core.training.loop import update_weights
from calm_core.training.optimisers import build_optimisers
from calm_core.transformer.model import Transformer, next_token_loss
from calm_core.transformer.training import transformer_config


class CalmStep(NamedTuple):
    """A step of CALM, and what it trains."""

    model: Calm
    autoencoder: Autoencoder
    objective: HeadObjective
    run: Callable[[], None]


class TransformerStep(NamedTuple):
    """A step of the Transformer, and what it trains."""

    model: Transformer
    run: Callable[[], None]


def calm_step(params: Params) -> CalmStep:
    """Draws, forward and backward pass, clipping and optimiser; reading the batch is left out."""
    draws, section = generator(0, "benchmarks"), params.calm
    coder = autoencoder_config(params.autoencoder, params.tokenizer.vocabulary_size)
    model, autoencoder = Calm(calm_config(section, coder)), Autoencoder(coder).requires_grad_(False)
    model.initialise(draws)
    autoencoder.initialise(draws)
    objective = head_objective(section, autoencoder)
    shape = (section.batch_sequences, section.context_tokens // coder.patch_size, coder.patch_size)
    patches = torch.randint(coder.vocabulary_size, shape, generator=draws)
    positions = shape[0] * shape[1]
    posterior = Posterior(*torch.zeros(2, positions, coder.latent_size))

    def loss() -> Tensor:
        if isinstance(model.head, TokenHead):
            return model.head.loss(model(patches), patches, patches)
        hidden_states = model(model.inputs(patches, autoencoder)).flatten(0, 1)
        head_draws = model.latent_head.training_draws(positions, objective, GeneratorDraws(draws))
        return model.latent_head.loss(hidden_states, posterior, head_draws, objective).total

    return CalmStep(model, autoencoder, objective, _step(model, loss, section, params.runtime.precision))


def transformer_step(params: Params) -> TransformerStep:
    """The same for the Transformer."""
    draws, section, vocabulary_size = generator(0, "benchmarks"), params.transformer, params.tokenizer.vocabulary_size
    model = Transformer(transformer_config(section, vocabulary_size))
    model.initialise(draws)
    token_ids = torch.randint(vocabulary_size, (section.batch_sequences, section.context_tokens + 1), generator=draws)
    run = _step(model, lambda: next_token_loss(model, token_ids), section, params.runtime.precision)
    return TransformerStep(model, run)


def _step(
    model: nn.Module, loss: Callable[[], Tensor], section: LanguageModelParams, precision: Precision
) -> Callable[[], None]:
    optimisers = build_optimisers(model, section)

    def run() -> None:
        with autocast(precision, torch.device("cpu")):
            value = loss()
        value.backward()
        update_weights(model, optimisers, section.gradient_clip)

    return run
