"""Measured tokens a second of the run's own shapes: a training step and an inference pass, on random weights.

Speed does not depend on what weights hold. The batches are the micro-batches of a device of the run, whatever the
machine. The models take turns, several times, and the median counts, since other work on the machine comes and goes.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.training import head_objective
from calm_core.params import LanguageModelParams, Params
from calm_core.runtime.precision import autocast
from calm_core.runtime.randomness import generator
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

ROUNDS = 5

BLOCK_POSITIONS = 1024
"""How many positions the Transformer's inference has logits of at once."""

LONGEST_SECONDS = 60.0
"""No round begins after it but the first: at the published shapes a round on a CPU takes minutes."""


def tokens_per_second(
    params: Params, calm: CalmConfig, coder: AutoencoderConfig, transformer: TransformerConfig, device: torch.device
) -> dict[str, float]:
    """Medians over ``ROUNDS`` of tokens a second; optimiser and data reading left out of the training steps."""
    weights = generator(0, "throughput")
    draws = torch.Generator(device).manual_seed(weights.initial_seed())
    calm_model, autoencoder, baseline = Calm(calm), Autoencoder(coder).requires_grad_(False), Transformer(transformer)
    for model in (calm_model, autoencoder, baseline):
        model.initialise(weights)
        model.to(device)

    def token_ids(*shape: int) -> Tensor:
        return torch.randint(coder.vocabulary_size, shape, generator=draws, device=device)

    section, patch_size = params.calm, coder.patch_size
    patches = token_ids(micro_batch(params, section), section.context_tokens // patch_size, patch_size)
    sequences = token_ids(micro_batch(params, params.transformer), params.transformer.context_tokens + 1)
    positions = patches.shape[0] * patches.shape[1]
    posterior = Posterior(*torch.zeros(2, positions, coder.latent_size, device=device))
    objective = head_objective(section, autoencoder)
    # Outside of what is timed: latents as input come from the encoded corpus, not from the encoder.
    patch_inputs = calm_model.inputs(patches, autoencoder)

    def calm_training() -> None:
        head_draws = calm_model.head.training_draws(positions, objective, draws)
        hidden_states = calm_model(patch_inputs).flatten(0, 1)
        calm_model.head.loss(hidden_states, posterior, head_draws, objective).total.backward()
        calm_model.zero_grad()

    def transformer_training() -> None:
        next_token_loss(baseline, sequences).backward()
        baseline.zero_grad()

    @torch.no_grad()
    def calm_inference() -> Tensor:
        noise = calm_model.head.sampling_draws(patches.shape[:2], draws)
        return autoencoder.decode(calm_model.head.sample(calm_model(patch_inputs), noise))

    @torch.no_grad()
    def transformer_inference() -> Tensor:
        # Block by block: the logits of a micro-batch, at the published vocabulary, are more than what trains it.
        blocks = baseline.hidden_states(sequences[:, :-1]).flatten(0, 1).split(BLOCK_POSITIONS)
        return torch.cat([baseline.output(block).argmax(dim=-1) for block in blocks])

    work: dict[str, tuple[Callable[[], object], int]] = {
        "calm_training_tokens_per_second": (calm_training, patches.numel()),
        "transformer_training_tokens_per_second": (transformer_training, sequences[:, 1:].numel()),
        "calm_inference_tokens_per_second": (calm_inference, patches.numel()),
        "transformer_inference_tokens_per_second": (transformer_inference, sequences[:, 1:].numel()),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    begun = time.perf_counter()
    # In turns, so that other work on the machine slows all four alike.
    for turn in range(ROUNDS + 1):
        if turn > 1 and time.perf_counter() - begun > LONGEST_SECONDS:
            break
        for name, (run, tokens) in work.items():
            _wait_for(device)
            started = time.perf_counter()
            with autocast(params.runtime.precision, device):
                run()
            _wait_for(device)
            if turn:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def micro_batch(params: Params, section: LanguageModelParams) -> int:
    """Sequences that a device of the run takes in a pass."""
    return section.batch_sequences // (params.runtime.processes * params.runtime.gradient_accumulation)


def _wait_for(device: torch.device) -> None:
    """Return when ``device`` has done what it was given: a GPU only takes orders."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
