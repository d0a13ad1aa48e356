"""The training step and the loop around it, the same for all three models.

What is trained, on what and with which loss comes in as one function of the step number, so that every
draw can be a function of (seed, stage, step) alone. Weights and optimiser state are float32; matrix products
run in bf16 where the machine is fast at it.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from calm_core.checkpoints import Checkpoint, CheckpointStore, Curve
from calm_core.interruption import deferred_signals
from calm_core.optimiser import build_optimisers, learning_rate_factor
from calm_core.params import Runtime, Training
from calm_core.precision import autocast
from calm_core.progress import progress
from calm_core.randomness import generator
from calm_core.training_health import Health
from calm_core.training_state import restore_state, training_state

LOGGED_POINTS = 200
"""How many points a training curve has, roughly."""

NAMED_ITEMS = 8
"""How many items of a batch a message names."""

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
    checkpoints: CheckpointStore | None = None,
    batch_of: Callable[[int], str] = "batch {}".format,
) -> None:
    """Minimise ``objective`` over the parameters of ``model`` for ``training.steps`` steps.

    ``log`` receives, some 200 times, the number of steps done and the means of the named scalars since
    the last time, beside what ``observe`` then sees; ``name`` and ``tokens_per_step`` are for the display.
    ``after_step`` is called with the number of steps done after each of them. ``batch_of`` tells in words what a step
    trains on.

    With ``checkpoints`` the training goes on after the last of them, hands ``log`` the points before it again, and ends
    with the same numbers as if it had never stopped; Ctrl-C and SIGTERM wait until the step at hand is saved.

    Raises:
        CalmError: loss or gradient of a step is not finite, or the loss leapt; no checkpoint is as late as that step.
    """
    optimisers = build_optimisers(model, training)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    every = max(1, training.steps // LOGGED_POINTS)
    first, curve, sums = _go_on(checkpoints, model, optimisers)
    if first:
        print(f"{name}: goes on after step {first} of {training.steps}", file=sys.stderr, flush=True)
    for done, values in curve:
        log(done, values)
    health = Health(name, batch_of, saved=first, first_loss=curve[0][1]["loss"] if curve else None)
    model.train()
    with (
        deferred_signals() if checkpoints is not None else nullcontext(lambda: False) as asked_to_stop,
        progress(name, training.steps * tokens_per_step, "tokens", first * tokens_per_step) as advance,
    ):
        for step in range(first, training.steps):
            factor = learning_rate_factor(step, training)
            for optimiser, optimiser_peaks in zip(optimisers, peaks, strict=True):
                for group, peak in zip(optimiser.param_groups, optimiser_peaks, strict=True):
                    group["lr"] = peak * factor
            with autocast(runtime.precision, torch.device("cpu")):
                losses = objective(step)
            gradient_norm = training_step(model, optimisers, losses["loss"], training.gradient_clip)
            health.observe(step, losses["loss"], gradient_norm)
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + value.detach()
            done, note = step + 1, ""
            if done % every == 0 or done == training.steps:
                health.require()
                point = {key: value.item() / (step % every + 1) for key, value in sums.items()}
                curve.append((done, {**point, **observe()}))
                log(*curve[-1])
                health.first_loss = curve[0][1]["loss"]
                note, sums = f"loss {point['loss']:.4g}", {}
            advance(tokens_per_step, note)
            after_step(done)
            stop = asked_to_stop()
            if checkpoints is not None and (stop or checkpoints.due() or done == training.steps):
                health.require()
                state = training_state(model, optimisers, sums)
                health.require_finite(state.values(), done)
                checkpoints.save(Checkpoint(done, state, curve))
                health.saved = done
            if stop:
                break
    model.eval()


def training_step(
    model: nn.Module, optimisers: list[torch.optim.Optimizer], loss: Tensor, gradient_clip: float
) -> Tensor:
    """Move the weights of ``model`` down the gradient of ``loss``, whose norm is clipped at ``gradient_clip``.

    Returns the norm before it was clipped, a scalar.
    """
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return norm


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


def described_batch(items: str, starts: Tensor) -> str:
    """In words: a batch of ``items`` that begin at tokens ``starts`` of the training split; names the first few."""
    named = ", ".join(f"{start:,}" for start in starts[:NAMED_ITEMS].tolist())
    rest = f" and {len(starts) - NAMED_ITEMS} more" if len(starts) > NAMED_ITEMS else ""
    return f"{items} from tokens {named}{rest} of the training split"


def _go_on(
    checkpoints: CheckpointStore | None, model: nn.Module, optimisers: list[torch.optim.Optimizer]
) -> tuple[int, Curve, dict[str, Tensor]]:
    """Steps done, curve and sums so far, with ``model`` and ``optimisers`` as they were then."""
    found = checkpoints.latest() if checkpoints is not None else None
    if found is None:
        return 0, [], {}
    return found.step, list(found.curve), restore_state(found.tensors, model, optimisers)
