"""The training step and the loop around it, the same for all three models.

What is trained, on what and with which loss comes in as one function of the step number and of rows of its batch, so
that every draw can be a function of (seed, stage, step, row) alone: one process or several, one pass a step or several,
see the same data and noise. Weights and optimiser state are float32; matrix products run in bf16 where the machine is
fast at it.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from calm_core.errors import CalmError
from calm_core.params import RuntimeParams, TrainingParams
from calm_core.runtime.precision import autocast
from calm_core.runtime.process_group import ALONE, Processes
from calm_core.runtime.progress import progress
from calm_core.runtime.signals import deferred_signals
from calm_core.training.checkpoints import Checkpoint, CheckpointStore, Curve
from calm_core.training.divergence import Health
from calm_core.training.optimisers import build_optimisers, learning_rate_factor
from calm_core.training.parallel_model import ParallelModel
from calm_core.training.sharding import whole
from calm_core.training.state import restore_state, training_state

LOGGED_POINTS = 200
"""How many points a training curve has, roughly."""

Objective = Callable[[int, range], Mapping[str, Tensor]]
"""From a step number, and which rows of its batch, to named scalars, means over these rows.

"loss" is minimised, the others are logged beside it.
"""

Model = TypeVar("Model", bound=nn.Module)


def train(
    model: Model,
    objective: Objective,
    training: TrainingParams,
    runtime: RuntimeParams,
    name: str,
    log: Callable[[int, Mapping[str, float]], None],
    rows: int,
    tokens_per_row: int,
    *,
    observe: Callable[[], Mapping[str, float]] = dict,
    keep: Callable[[int, Model], None] = lambda done, model: None,
    keep_at: Collection[int] = (),
    checkpoints: CheckpointStore | None = None,
    batch_of: Callable[[int], str] = "batch {}".format,
    processes: Processes = ALONE,
) -> Model:
    """Minimise ``objective`` over the parameters of ``model`` for ``training.steps`` steps; returns the trained model.

    A batch has ``rows`` rows of ``tokens_per_row`` tokens. ``processes`` share them, and each goes through its share in
    ``runtime.gradient_accumulation`` passes.

    ``log`` receives, some 200 times, the number of steps done and the means of the named scalars since the last time,
    beside what ``observe`` then sees; ``keep`` the number of steps done and the model, at the steps ``keep_at``.
    ``name`` is for the display, and ``batch_of`` tells in words what a step trains on.

    With ``checkpoints`` the training goes on after the last of them, hands ``log`` the points before it again, and ends
    with the same numbers as if it had never stopped; Ctrl-C and SIGTERM wait until the step at hand is saved.

    The first process alone has ``checkpoints``, logs and keeps. Each returns the model, whole and on the CPU: ``model``
    itself unless it was sharded.

    Raises:
        CalmError: loss or gradient of a step is not finite, or the loss leapt; no checkpoint is as late as that step.
            Or ``rows`` cannot be divided into equal parts.
    """
    passes = runtime.gradient_accumulation
    if rows % (processes.count * passes):
        raise CalmError(
            f"{name}: a batch of {rows} is not divisible by {processes.count} processes times "
            f"runtime.gradient_accumulation {passes}; change one of them"
        )
    share = processes.share(rows)
    size = len(share) // passes
    parts = [share[start : start + size] for start in range(0, len(share), size)]

    parallel = ParallelModel(model, processes, runtime.parallelism, runtime.activation_checkpointing)
    optimisers = build_optimisers(model, training)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    every = max(1, training.steps // LOGGED_POINTS)
    resumable = processes.agreed(checkpoints is not None)
    first, curve, sums = _go_on(checkpoints, model, optimisers, processes)
    if processes.is_first:
        if first:
            print(f"{name}: goes on after step {first} of {training.steps}", file=sys.stderr, flush=True)
        for done, values in curve:
            log(done, values)
    health = Health(name, batch_of, first, curve[0][1]["loss"] if curve else None, processes)
    tokens_per_step = rows * tokens_per_row
    model.train()
    with (
        deferred_signals() if resumable else nullcontext(lambda: False) as asked_to_stop,
        progress(name, training.steps * tokens_per_step, "tokens", first * tokens_per_step)
        if processes.is_first
        else nullcontext(lambda done, note: None) as advance,
    ):
        for step in range(first, training.steps):
            factor = learning_rate_factor(step, training)
            for optimiser, optimiser_peaks in zip(optimisers, peaks, strict=True):
                for group, peak in zip(optimiser.param_groups, optimiser_peaks, strict=True):
                    group["lr"] = peak * factor
            loss, means = _passes(partial(objective, step), parts, parallel, runtime, processes)
            gradient_norm = training_step(model, optimisers, loss, training.gradient_clip)
            health.observe(step, means["loss"], gradient_norm)
            for key, value in means.items():
                sums[key] = sums.get(key, 0) + value
            done, note = step + 1, ""
            if done % every == 0 or done == training.steps:
                health.require()
                totals = {key: processes.mean(value) for key, value in sums.items()}
                point = {key: value.item() / (step % every + 1) for key, value in totals.items()}
                curve.append((done, {**point, **parallel.look(observe)}))
                if processes.is_first:
                    log(*curve[-1])
                health.first_loss = curve[0][1]["loss"]
                note, sums = f"loss {point['loss']:.4g}", {}
            advance(tokens_per_step, note)
            if done in keep_at:
                kept = parallel.whole()
                if processes.is_first:
                    keep(done, kept)
            stop, due = processes.any([asked_to_stop(), checkpoints is not None and checkpoints.due()])
            if resumable and (stop or due or done == training.steps):
                health.require()
                sums = {key: processes.mean(value) for key, value in sums.items()}
                state = training_state(model, optimisers, sums)
                health.require_finite(state.values(), done)
                if checkpoints is not None:
                    checkpoints.save(Checkpoint(done, state, curve))
                health.saved = done
            if stop:
                break
    return parallel.whole().cpu().eval()


def _passes(
    objective: Callable[[range], Mapping[str, Tensor]],
    parts: list[range],
    parallel: ParallelModel,
    runtime: RuntimeParams,
    processes: Processes,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A step's passes, one for each of ``parts``; all but the last go back too, gradients adding up.

    Returns the loss of the last, which is still to go back and has other processes average theirs with it, and the
    means of all named scalars over passes.
    """
    means: dict[str, Tensor] = {}
    for part in parts:
        is_last = part is parts[-1]
        with nullcontext() if is_last else parallel.without_averaging():
            with autocast(runtime.precision, processes.device):
                losses = parallel.run(partial(objective, part))
            loss = losses["loss"] / len(parts)
            if not is_last:
                loss.backward()
        for key, value in losses.items():
            means[key] = means.get(key, 0) + value.detach() / len(parts)
    return loss, means


def training_step(
    model: nn.Module, optimisers: list[torch.optim.Optimizer], loss: Tensor, gradient_clip: float
) -> Tensor:
    """Move the weights of ``model`` down the gradient of ``loss``, whose norm is clipped at ``gradient_clip``.

    Gradients of earlier passes are added. Returns the norm before it was clipped, a scalar.
    """
    loss.backward()
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), gradient_clip))
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return norm


def _go_on(
    checkpoints: CheckpointStore | None,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    processes: Processes,
) -> tuple[int, Curve, dict[str, Tensor]]:
    """Steps done, curve and sums so far, with ``model`` and ``optimisers`` as they were then."""
    found = checkpoints.latest() if checkpoints is not None else None
    step, curve = processes.agreed((0, []) if found is None else (found.step, list(found.curve)))
    if step == 0:
        return 0, [], {}
    tensors = processes.from_first(None if found is None else found.tensors)
    return step, curve, restore_state(tensors, model, optimisers)
