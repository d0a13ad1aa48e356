"""What is learnt, apart from how: the interface between a model's own training module and the loop.

A batch is a function of the step number and of rows of it, data and random draws alike, so that every draw depends on
(seed, stage, step, row) alone: one process or several, one micro-batch a step or several, see the same data and noise.
"""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")


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

    def batch(self, step: int, rows: range) -> Batch:
        """Everything that ``rows`` of the batch of ``step`` need: a NamedTuple of CPU tensors, or of such tuples."""

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch, which is on the model's device."""

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        """More figures for a point of the training curve, from the features of the last step's first micro-batch."""

    def describe_batch(self, step: int) -> str:
        """In words: which text ``step`` trains on, for messages about it."""


def on_device(batch: Any, device: Any) -> Any:
    """``batch``, a tensor or a NamedTuple of batches, on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return type(batch)(*(on_device(part, device) for part in batch))
