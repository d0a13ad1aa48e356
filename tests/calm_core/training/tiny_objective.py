"""A model and a loss of it, given as a function of the step, as an objective of one row of one token."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from calm_core.training.objective import CPU, Loss

LossAt = Callable[[nn.Module, int], dict[str, Tensor]]
"""From a model and a step to "loss" and other scalars."""


class TinyObjective:
    name, rows, tokens_per_row = "test", 1, 1

    def __init__(self, model: nn.Module, loss_at: LossAt) -> None:
        self.model, self._loss_at = model, loss_at

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> Tensor:
        return torch.tensor(step)

    def loss(self, batch: Tensor) -> Loss:
        terms = self._loss_at(self.model, int(batch))
        return Loss(terms.pop("loss"), terms)

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        return {}

    def describe_batch(self, step: int) -> str:
        return f"rows {step}"
