"""Measured tokens a second of the run's own shapes: a training step and an inference pass, on random weights.

Speed does not depend on what weights hold. The models take turns, several times, and the median counts, since
other work on the machine comes and goes.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.training import head_objective
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import Params
from calm_core.runtime.precision import autocast
from calm_core.runtime.randomness import generator
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

ROUNDS = 5


def tokens_per_second(
    params: Params, calm: CalmConfig, coder: AutoencoderConfig, transformer: TransformerConfig
) -> dict[str, float]:
    """Medians over ``ROUNDS`` of tokens a second; optimiser and data reading left out of the training steps."""
    draws = generator(0, "throughput")
    calm_model, autoencoder, baseline = Calm(calm), Autoencoder(coder).requires_grad_(False), Transformer(transformer)
    for model in (calm_model, autoencoder, baseline):
        model.initialise(draws)
    section, context = params.calm, params.calm.context_tokens
    patches = torch.randint(
        coder.vocabulary_size, (section.batch_sequences, context // coder.patch_size, coder.patch_size), generator=draws
    )
    shape = (params.transformer.batch_sequences, params.transformer.context_tokens + 1)
    token_ids = torch.randint(coder.vocabulary_size, shape, generator=draws)
    positions = patches.shape[0] * patches.shape[1]
    posterior = Posterior(torch.zeros(positions, coder.latent_size), torch.zeros(positions, coder.latent_size))
    objective = head_objective(section, autoencoder)
    # Outside of what is timed: latents as input come from the encoded corpus, not from the encoder.
    patch_inputs = calm_model.inputs(patches, autoencoder)

    def calm_training() -> None:
        head_draws = calm_model.head.training_draws(positions, objective, GeneratorDraws(draws))
        hidden_states = calm_model(patch_inputs).flatten(0, 1)
        calm_model.head.loss(hidden_states, posterior, head_draws, objective).total.backward()
        calm_model.zero_grad()

    def transformer_training() -> None:
        next_token_loss(baseline, token_ids).backward()
        baseline.zero_grad()

    @torch.no_grad()
    def calm_inference() -> Tensor:
        noise = calm_model.head.sampling_draws(patches.shape[:2], draws)
        return autoencoder.decode(calm_model.head.sample(calm_model(patch_inputs), noise))

    @torch.no_grad()
    def transformer_inference() -> Tensor:
        return baseline(token_ids[:, :-1]).argmax(dim=-1)

    work: dict[str, tuple[Callable[[], object], int]] = {
        "calm_training_tokens_per_second": (calm_training, patches.numel()),
        "transformer_training_tokens_per_second": (transformer_training, token_ids[:, 1:].numel()),
        "calm_inference_tokens_per_second": (calm_inference, patches.numel()),
        "transformer_inference_tokens_per_second": (transformer_inference, token_ids[:, 1:].numel()),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    # In turns, so that other work on the machine slows all four alike.
    for turn in range(ROUNDS + 1):
        for name, (run, tokens) in work.items():
            started = time.perf_counter()
            with autocast(params.runtime.precision, torch.device("cpu")):
                run()
            if turn:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}
