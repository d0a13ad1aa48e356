"""The forward and backward passes of a step: what they leave are gradients, means of logged scalars, and features.

Two ways, of which the machine decides:
- ``in turn``: micro-batch by micro-batch, each by all threads' or the GPU's operators. A GPU's batches are made ahead;
- ``side by side``: on a CPU, where the model is small. Each thread takes rows of its own through the whole pass, so
  that threads wait for one another once a step (``runtime.threads``). Gradients are added in the order of the rows: the
  same number of threads gives the same bytes again.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calm_core.errors import CalmError
from calm_core.params import RuntimeParams
from calm_core.runtime.precision import autocast
from calm_core.runtime.process_group import ProcessGroup
from calm_core.runtime.threads import made_ahead, operators_of_one_thread, threads_side_by_side
from calm_core.training.objective import Loss, Model, Objective
from calm_core.training.parallel_model import ParallelModel


class PassesOfStep(NamedTuple):
    """What the passes of a step leave beside the gradients."""

    means: dict[str, Tensor]
    """Of the loss and the other logged scalars, over micro-batches."""
    features: Tensor | None
    """Of the first micro-batch."""


class Passes:
    """The passes of ``objective`` for ``steps``, asked for in their order, in a ``with``.

    Raises:
        CalmError: the rows of a batch cannot be divided into equal micro-batches.
    """

    def __init__(
        self,
        objective: Objective[Model, Any],
        parallel: ParallelModel[Model],
        runtime: RuntimeParams,
        processes: ProcessGroup,
        steps: range,
    ) -> None:
        self._objective, self._parallel = objective, parallel
        self._runtime, self._processes = runtime, processes
        self._parts = _micro_batches(objective, processes, runtime.gradient_accumulation)
        threads = threads_of_batch(objective, processes, runtime)
        self._stack = ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            self._parts = [part for rows in self._parts for part in _divided(rows, threads)]
            self._stack.enter_context(operators_of_one_thread())
            self._pool = self._stack.enter_context(ThreadPoolExecutor(threads))
        self._threads = threads
        self._batches = self._all_batches(steps)

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()
        self._stack.close()

    def of_step(self, step: int) -> PassesOfStep:
        """Gradients of the batch of ``step`` in the parameters, averaged over the processes; the rest returned."""
        return self._in_turn() if self._pool is None else self._side_by_side(step, self._pool)

    def _all_batches(self, steps: range) -> Generator[Any, None, None]:
        keys = ((step, rows) for step in steps for rows in self._parts)
        if self._processes.device.type == "cpu":
            # Nothing to win: a thread that reads would take a core from those that compute.
            yield from map(self._batch, keys)
        else:
            yield from made_ahead(self._batch, keys)

    def _batch(self, key: tuple[int, range]) -> Any:
        return self._objective.batch(*key, self._processes.device)

    def _in_turn(self) -> PassesOfStep:
        sums = _Sums(len(self._parts))
        for number, _ in enumerate(self._parts):
            batch = next(self._batches)
            # The backward pass of the last micro-batch averages the gradients over the processes. DDP wants the forward
            # pass inside no_sync too; the backward pass is outside of autocast, as torch advises.
            is_last = number == len(self._parts) - 1
            with nullcontext() if is_last else self._parallel.no_sync():
                with autocast(self._runtime.precision, self._processes.device):
                    result: Loss = self._parallel.forward(partial(self._objective.loss, batch))
                # Gradients add up over micro-batches, so each counts for its share of the mean.
                (result.total / len(self._parts)).backward()
            sums.add(result)
        return sums.passes()

    def _side_by_side(self, step: int, pool: ThreadPoolExecutor) -> PassesOfStep:
        parameters = [parameter for parameter in self._objective.model.parameters() if parameter.requires_grad]

        def one(rows: range) -> tuple[Loss, tuple[Tensor | None, ...]]:
            # Autocast is a setting of a thread.
            with autocast(self._runtime.precision, self._processes.device):
                result: Loss = self._parallel.forward(partial(self._objective.loss, self._batch((step, rows))))
            # Not .backward(): threads would add to the same tensors in the order in which they come.
            return result, torch.autograd.grad(result.total / len(self._parts), parameters, allow_unused=True)

        sums, gradients = _Sums(len(self._parts)), list[Tensor | None]()
        # So many at a time, so that gradients of no more wait to be added.
        for first in range(0, len(self._parts), self._threads):
            for result, of_part in pool.map(one, self._parts[first : first + self._threads]):
                sums.add(result)
                for total, gradient in zip(gradients, of_part, strict=True) if gradients else ():
                    if total is not None and gradient is not None:
                        total += gradient
                gradients = gradients or list(of_part)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return sums.passes()


def threads_of_batch(objective: Objective[Model, Any], processes: ProcessGroup, runtime: RuntimeParams) -> int:
    """How many threads share the rows of a micro-batch of ``objective``, 1 if passes are made in turn.

    Raises:
        CalmError: the rows of a batch cannot be divided into equal micro-batches.
    """
    rows = len(_micro_batches(objective, processes, runtime.gradient_accumulation)[0])
    return threads_of_rows(objective.model, rows, processes, runtime)


def threads_of_rows(model: nn.Module, rows: int, processes: ProcessGroup, runtime: RuntimeParams) -> int:
    """How many threads share the ``rows`` of a micro-batch, 1 if passes are made in turn."""
    # Several processes share rows already; compiled layers would be compiled by several threads at once.
    if processes.count > 1 or runtime.compile:
        return 1
    most = min(threads_side_by_side(processes.device, model), rows)
    # Equal parts, as micro-batches are.
    return max(count for count in range(1, most + 1) if rows % count == 0)


class _Sums:
    """Means over ``parts``, as the passes go on."""

    def __init__(self, parts: int) -> None:
        self._parts, self._means = parts, dict[str, Tensor]()
        self._features: Tensor | None = None

    def add(self, result: Loss) -> None:
        if not self._means:
            self._features = result.features
        for name, value in {"loss": result.total, **result.terms}.items():
            self._means[name] = self._means.get(name, 0) + value.detach() / self._parts

    def passes(self) -> PassesOfStep:
        return PassesOfStep(self._means, self._features)


def _micro_batches(objective: Objective[Any, Any], processes: ProcessGroup, accumulation: int) -> list[range]:
    """Which rows of each batch this process takes, divided into ``accumulation`` equal parts."""
    if objective.rows % (processes.count * accumulation):
        raise CalmError(
            f"{objective.name}: a batch of {objective.rows} is not divisible by {processes.count} processes times "
            f"runtime.gradient_accumulation {accumulation}; change one of them"
        )
    # Equal parts: the mean over micro-batches and processes is then the mean over the batch.
    return _divided(processes.chunk(objective.rows), accumulation)


def _divided(rows: range, parts: int) -> list[range]:
    size = len(rows) // parts
    return [rows[start : start + size] for start in range(0, len(rows), size)]
