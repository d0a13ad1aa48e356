"""Measured tokens a second of the run's own shapes: a training step and an inference pass, on random weights.

Speed does not depend on what weights hold. The batches are the micro-batches of a device of the run, whatever the
machine. The models take turns, several times, and the median counts, since other work on the machine comes and goes.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead
from calm_core.calm.training import head_objective
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import LanguageModelParams, Params
from calm_core.runtime.precision import autocast
from calm_core.runtime.process_group import ProcessGroup
from calm_core.runtime.randomness import generator
from calm_core.runtime.threads import made_ahead, operators_of_one_thread
from calm_core.training.passes import threads_of_rows
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
    for fresh in (calm_model, autoencoder, baseline):
        fresh.initialise(weights)
        fresh.to(device)

    def token_ids(*shape: int) -> Tensor:
        return torch.randint(coder.vocabulary_size, shape, generator=draws, device=device)

    section, patch_size = params.calm, coder.patch_size
    patches = token_ids(micro_batch(params, section), section.context_tokens // patch_size, patch_size)
    sequences = token_ids(micro_batch(params, params.transformer), params.transformer.context_tokens + 1)
    objective = head_objective(section, autoencoder)
    # Outside of what is timed: latents, as input and as targets, come from the encoded corpus, not from the encoder.
    patch_inputs = calm_model.inputs(patches, autoencoder)

    def calm_training(rows: Tensor) -> Tensor:
        if isinstance(calm_model.head, TokenHead):
            return calm_model.head.loss(calm_model(rows), rows, rows)
        positions = rows.shape[0] * rows.shape[1]
        posterior = Posterior(*torch.zeros(2, positions, coder.latent_size, device=device))
        head_draws = calm_model.latent_head.training_draws(positions, objective, GeneratorDraws(draws))
        hidden_states = calm_model(rows).flatten(0, 1)
        return calm_model.latent_head.loss(hidden_states, posterior, head_draws, objective).total

    def transformer_training(rows: Tensor) -> Tensor:
        return next_token_loss(baseline, rows)

    @torch.no_grad()
    def calm_inference(rows: Tensor) -> None:
        hidden_states, head = calm_model(rows), calm_model.head
        if isinstance(head, TokenHead):
            for position in range(patch_size):
                for block in hidden_states.flatten(0, 1).split(BLOCK_POSITIONS):
                    head.logits(block, rows.new_zeros(len(block), patch_size + position)).argmax(dim=-1)
            return
        noise = head.sampling_draws(rows.shape[:2], draws)
        autoencoder.decode(head.sample(hidden_states, noise))

    @torch.no_grad()
    def transformer_inference(rows: Tensor) -> None:
        # Block by block: the logits of a micro-batch, at the published vocabulary, are more than what trains it.
        for block in baseline.hidden_states(rows[:, :-1]).flatten(0, 1).split(BLOCK_POSITIONS):
            baseline.output(block).argmax(dim=-1)

    def training(loss: Callable[[Tensor], Tensor], model: nn.Module) -> Callable[[Tensor], object]:
        def run(rows: Tensor) -> object:
            with autocast(params.runtime.precision, device):
                total = loss(rows)
            return torch.autograd.grad(total, list(model.parameters()))

        return run

    def inference(work: Callable[[Tensor], None]) -> Callable[[Tensor], object]:
        def run(rows: Tensor) -> None:
            with autocast(params.runtime.precision, device):
                work(rows)

        return run

    of_calm = (calm_model, patch_inputs, patches.numel())
    of_transformer = (baseline, sequences, sequences[:, 1:].numel())
    work = {
        "calm_training_tokens_per_second": (training(calm_training, calm_model), *of_calm),
        "transformer_training_tokens_per_second": (training(transformer_training, baseline), *of_transformer),
        "calm_inference_tokens_per_second": (inference(calm_inference), *of_calm),
        "transformer_inference_tokens_per_second": (inference(transformer_inference), *of_transformer),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    begun = time.perf_counter()
    # In turns, so that other work on the machine slows all four alike.
    for turn in range(ROUNDS + 1):
        if turn > 1 and time.perf_counter() - begun > LONGEST_SECONDS:
            break
        for name, (run, model, rows, tokens) in work.items():
            parts = rows.chunk(threads_of_rows(model, len(rows), ProcessGroup(device=device), params.runtime))
            _wait_for(device)
            started = time.perf_counter()
            _side_by_side(run, parts)
            _wait_for(device)
            if turn:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def _side_by_side(run: Callable[[Tensor], object], parts: Sequence[Tensor]) -> None:
    """As the training's own passes share rows (``training.passes``)."""
    if len(parts) == 1:
        run(parts[0])
        return
    with operators_of_one_thread():
        list(made_ahead(run, parts, len(parts), len(parts)))


def micro_batch(params: Params, section: LanguageModelParams) -> int:
    """Sequences that a device of the run takes in a pass."""
    return section.batch_sequences // (params.runtime.processes * params.runtime.gradient_accumulation)


def _wait_for(device: torch.device) -> None:
    """Return when ``device`` has done what it was given: a GPU only takes orders."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
