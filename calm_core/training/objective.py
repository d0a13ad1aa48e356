"""What is learnt, apart from how: the interface between a model's own training module and the loop.

A batch is a function of the step number and of rows of it, data and random draws alike, so that every draw depends on
(seed, stage, step, row) alone: one process or several, one micro-batch a step or several, see the same data and noise.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")

CPU = torch.device("cpu")


class Loss(NamedTuple):
    """What a model makes of a batch; means over its rows."""

    total: Tensor
    """The scalar that is minimised."""
    terms: Mapping[str, Tensor] = {}
    """Scalars that are logged beside it, without gradients."""
    features: Tensor | None = None
    """What ``Objective.observe`` needs of the forward pass, without gradients."""


class Objective(Protocol, Generic[Model, Batch]):
    """A model, the batches that it learns from and the loss that it minimises."""

    model: Model
    name: str
    """For the display and for messages."""
    rows: int
    """Rows of a batch."""
    tokens_per_row: int

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> Batch:
        """Everything that ``rows`` of the batch of ``step`` need: a NamedTuple of tensors on ``device``, or of such
        tuples. May be called in a thread, some steps ahead; a GPU is given work and not waited for."""

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch, which is on the model's device."""

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        """More figures for a point of the training curve, from the features of the last step's first micro-batch."""

    def describe_batch(self, step: int) -> str:
        """In words: which text ``step`` trains on, for messages about it."""


class _Drawn(Protocol):
    def initialise(self, generator: torch.Generator) -> None: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


Drawn = TypeVar("Drawn", bound=_Drawn)


def starting_model(initial: Drawn | None, fresh: Callable[[], Drawn], generator: torch.Generator) -> Drawn:
    """The model that is trained: ``initial`` itself, or without one a ``fresh`` one of weights by ``generator``."""
    if initial is not None:
        initial.requires_grad_(True)
        return initial
    model = fresh()
    model.initialise(generator)
    return model


def on_device(batch: Any, device: torch.device) -> Any:
    """``batch``, a CPU tensor or a NamedTuple of batches, on ``device``."""
    if isinstance(batch, Tensor):
        # From pinned memory a copy to a GPU runs beside its work and this thread's.
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)
    return type(batch)(*(on_device(part, device) for part in batch))
