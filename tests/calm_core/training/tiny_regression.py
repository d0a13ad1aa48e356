"""An objective of several rows, whose model has weights of each kind: an embedding, a matrix, others."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calm_core.training.objective import CPU, Loss


class Rows(NamedTuple):
    token_ids: Tensor
    targets: Tensor


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 6)
        self.output = nn.Linear(6, 2, bias=False)
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=draws)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(token_ids)).tanh())


class TinyRegression:
    """Notes which rows of which step it is asked for, and what it is given to observe."""

    name, tokens_per_row = "regression", 1

    def __init__(self, rows: int = 8) -> None:
        self.model, self.rows = TinyModel(), rows
        self.asked: list[tuple[int, range]] = []
        self.observed: list[Tensor] = []

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> Rows:
        self.asked.append((step, rows))
        draws = torch.Generator().manual_seed(step)
        whole = Rows(torch.randint(5, (self.rows,), generator=draws), torch.randn(self.rows, 2, generator=draws))
        return Rows(*(values[rows.start : rows.stop] for values in whole))

    def loss(self, batch: Rows) -> Loss:
        errors = self.model(batch.token_ids) - batch.targets
        return Loss(errors.square().sum(dim=-1).mean(), {"error": errors.detach().abs().mean()}, batch.targets)

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        assert features is not None
        self.observed.append(features)
        return {"first": float(features[0, 0])}

    def describe_batch(self, step: int) -> str:
        return f"rows of {step}"
