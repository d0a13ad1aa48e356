"""The training step and the loop around it, the same for all three models.

What is trained, on what and with which loss comes in as one function of the step number, so that every
draw can be a function of (seed, stage, step) alone. Weights and optimiser state are float32; matrix products
run in bf16 where the machine is fast at it.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from calm_core.errors import CalmError
from calm_core.optimiser import build_optimisers, learning_rate_factor
from calm_core.params import Runtime, Training
from calm_core.precision import autocast
from calm_core.progress import progress
from calm_core.randomness import generator

LOGGED_POINTS = 200
"""How many points a training curve has, roughly."""

Objective = Callable[[int], Mapping[str, Tensor]]
"""From a step number to named scalars; "loss" is minimised, the others are logged beside it."""


def train(
    model: nn.Module,
    objective: Objective,
    training: Training,
    runtime: Runtime,
    name: str,
    log: Callable[[int, Mapping[str, float]], None],
    tokens_per_step: int,
    observe: Callable[[], Mapping[str, float]] = dict,
    after_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Minimise ``objective`` over the parameters of ``model`` for ``training.steps`` steps.

    ``log`` receives, some 200 times, the number of steps done and the means of the named scalars since
    the last time, beside what ``observe`` then sees; ``name`` and ``tokens_per_step`` are for the display.
    ``after_step`` is called with the number of steps done after each of them.

    Raises:
        CalmError: the loss is not a finite number.
    """
    optimisers = build_optimisers(model, training)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    every = max(1, training.steps // LOGGED_POINTS)
    sums: dict[str, Tensor] = {}
    model.train()
    with progress(name, training.steps * tokens_per_step, "tokens") as advance:
        for step in range(training.steps):
            factor = learning_rate_factor(step, training)
            for optimiser, optimiser_peaks in zip(optimisers, peaks, strict=True):
                for group, peak in zip(optimiser.param_groups, optimiser_peaks, strict=True):
                    group["lr"] = peak * factor
            with autocast(runtime.precision, torch.device("cpu")):
                values = objective(step)
            training_step(model, optimisers, values["loss"], training.gradient_clip)
            for key, value in values.items():
                sums[key] = sums.get(key, 0) + value.detach()
            if (step + 1) % every == 0 or step + 1 == training.steps:
                count = step % every + 1
                means = {key: value.item() / count for key, value in sums.items()}
                _require_finite(means, step, name)
                log(step + 1, {**means, **observe()})
                note = f"loss {means['loss']:.4g}"
                sums = {}
            advance(tokens_per_step, note if sums == {} else "")
            after_step(step + 1)
    model.eval()


def training_step(
    model: nn.Module, optimisers: list[torch.optim.Optimizer], loss: Tensor, gradient_clip: float
) -> None:
    """Move the weights of ``model`` down the gradient of ``loss``, whose norm is clipped at ``gradient_clip``."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()


def batch_indices(step: int, batch: int, count: int, seed: int, stage: str) -> Tensor:
    """Which ``batch`` of ``count`` items step number ``step`` trains on: each once an epoch, newly shuffled."""
    pieces: list[Tensor] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, first = divmod(position, count)
        pieces.append(_epoch_order(epoch, count, seed, stage)[first : first + end - position])
        position += len(pieces[-1])
    return torch.cat(pieces)


# One epoch is in use at a time, and the next in a batch that begins it.
@lru_cache(maxsize=2)
def _epoch_order(epoch: int, count: int, seed: int, stage: str) -> Tensor:
    return torch.randperm(count, generator=generator(seed, stage, "order", epoch))


def _require_finite(means: Mapping[str, float], step: int, name: str) -> None:
    if not all(torch.isfinite(torch.tensor(list(means.values())))):
        raise CalmError(
            f"{name}: the loss is {means['loss']} by step {step + 1}; lower the learning rates or check data"
        )
