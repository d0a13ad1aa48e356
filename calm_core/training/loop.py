"""The training loop, the same for all three models.

What is learnt comes in as an ``Objective``, what is around it (curve, checkpoints, processes) as a ``Run``. Weights and
optimiser state are float32; matrix products run in bf16 where the machine is fast at it.
"""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from calm_core.params import RuntimeParams, TrainingParams
from calm_core.runtime.precision import products, set_float32_products
from calm_core.runtime.progress import progress
from calm_core.runtime.signals import deferred_signals
from calm_core.training.checkpoints import Checkpoint, Points
from calm_core.training.curve import TrainingCurve
from calm_core.training.divergence import Divergence
from calm_core.training.objective import Model, Objective
from calm_core.training.optimisers import build_optimisers, set_learning_rates
from calm_core.training.parallel_model import ParallelModel
from calm_core.training.passes import Passes, threads_of_batch
from calm_core.training.run import Run
from calm_core.training.sharding import full_tensor
from calm_core.training.state import Optimisers, gather_state, restore_state


def train(
    objective: Objective[Model, Any], training: TrainingParams, runtime: RuntimeParams, run: Run | None = None
) -> Model:
    """Minimise ``objective`` over its model's parameters for ``training.steps`` steps; returns the trained model.

    The processes of ``run`` share the rows of a batch, and each goes through its chunk in
    ``runtime.gradient_accumulation`` micro-batches, see ``passes``. With checkpoints the training resumes from the last
    of them, logs the points before it again, and ends with the same numbers as if it had never stopped; Ctrl-C and
    SIGTERM wait until the step at hand is saved. The model that the first process returns is unsharded and on the CPU.

    Raises:
        CalmError: loss or gradient of a step is not finite, or the loss leapt; no checkpoint is as late as that step.
            Or the rows of a batch cannot be divided into equal micro-batches.
    """
    run = run or Run()
    processes, steps = run.processes, training.steps
    set_float32_products(runtime.precision, processes.device)
    # Before the optimisers: FSDP replaces the parameters that they have to hold.
    parallel = ParallelModel(objective.model, processes, runtime)
    threads = threads_of_batch(objective, processes, runtime)
    optimisers = build_optimisers(objective.model, training, products(runtime.precision, processes.device), threads)
    # The first process alone has checkpoints, but saving one is a collective: all have to know whether it will happen.
    resumable = processes.broadcast_object(run.checkpoints is not None)
    first, points, sums = _resume(run, objective.model, optimisers)
    curve = TrainingCurve(steps, points, sums, processes)
    divergence = Divergence(objective.name, objective.describe_batch, first, processes)
    if run.is_first:
        _log_again(run, objective.name, first, steps, points)
    tokens = objective.rows * objective.tokens_per_row
    objective.model.train()
    with (
        Passes(objective, parallel, runtime, processes, range(first, steps)) as passes,
        deferred_signals() if resumable else nullcontext(lambda: False) as asked_to_stop,
        progress(objective.name, steps * tokens, "tokens", first * tokens)
        if run.is_first
        else nullcontext(lambda done, note: None) as advance,
    ):
        for step in range(first, steps):
            done, note = step + 1, ""
            set_learning_rates(optimisers, step, training)
            means, features = passes.of_step(step)
            gradient_norm = update_weights(objective.model, optimisers, training.gradient_clip)
            # Nothing down to here reads a value, so that the device works on while Python prepares the next step.
            divergence.observe(step, means["loss"], gradient_norm)
            curve.add(means)
            if curve.is_due(done):
                # Before the point is logged: no NaN reaches the curve.
                divergence.require_none(curve.first_loss)
                observed = parallel.no_grad_forward(partial(objective.observe, features))
                point = curve.close_point(done, observed)
                if run.is_first:
                    run.log(done, point)
                note = f"loss {point['loss']:.4g}"
            advance(tokens, note)
            if done in run.kept_after:
                # A collective, so every process calls it although only the first one keeps the result.
                kept = parallel.full_model()
                if run.is_first:
                    run.keep(done, kept)
            # A signal may reach one process earlier, and the first one alone knows the time: all act in the same step.
            due = run.checkpoints is not None and run.checkpoints.due()
            stop, due = processes.any_rank([asked_to_stop(), due])
            # The last step is saved too: a stage that fails while it writes its outputs then resumes without training
            # again.
            if resumable and (stop or due or done == steps):
                divergence.require_none(curve.first_loss)
                _save(run, done, objective.model, optimisers, curve, divergence)
            if stop:
                break
    return parallel.full_model().cpu().eval()


def update_weights(model: nn.Module, optimisers: Optimisers, gradient_clip: float) -> Tensor:
    """Move the weights of ``model`` down their gradients, whose norm is clipped at ``gradient_clip``.

    Returns the norm before it was clipped, a scalar.
    """
    # Under FSDP the norm is a DTensor.
    norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), gradient_clip))
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return norm


def _resume(run: Run, model: nn.Module, optimisers: Optimisers) -> tuple[int, Points, Mapping[str, Tensor]]:
    """Restore the last checkpoint of ``run``, if there is one: steps done, points of the curve, sums since the last."""
    found = run.checkpoints.latest() if run.checkpoints is not None else None
    # The first process reads; steps, points and sums are small enough to broadcast as one object. Weights are not.
    mine = (0, [], {}) if found is None else (found.step, list(found.curve), _sums(found.tensors))
    step, points, sums = run.processes.broadcast_object(mine)
    if step:
        restore_state({} if found is None else found.tensors, model, optimisers, run.processes)
    return step, points, {name: total.to(run.processes.device) for name, total in sums.items()}


def _save(
    run: Run, done: int, model: nn.Module, optimisers: Optimisers, curve: TrainingCurve, divergence: Divergence
) -> None:
    """Write a checkpoint after ``done`` steps; all processes take part, and all raise if the state is not finite."""
    # Both lines are collectives. The state of all processes but the first is empty beside the sums.
    sums = {f"{_SUM}{name}": total.cpu() for name, total in curve.mean_sums().items()}
    state = gather_state(model, optimisers) | sums
    divergence.require_finite(state.values(), done)
    if run.checkpoints is not None:
        run.checkpoints.save(Checkpoint(done, state, curve.points))
    divergence.saved = done


_SUM = "sum."
"""How the names of the curve's sums begin in a checkpoint."""


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_SUM): tensor for name, tensor in tensors.items() if name.startswith(_SUM)}


def _log_again(run: Run, name: str, first: int, steps: int, points: Points) -> None:
    if first:
        print(f"{name}: goes on after step {first} of {steps}", file=sys.stderr, flush=True)
    # DVC deleted the curve's files, an output of the stage, before the stage ran again.
    for done, values in points:
        run.log(done, values)
