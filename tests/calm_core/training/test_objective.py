"""What holds for the objective of every model: seeds, parts of a batch, and moving it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from calm_core.nn.layers import initialise
from calm_core.params import Params
from calm_core.training.objective import on_device
from tests.calm_core.training.tiny_trainings import BUILDS, seeded

every_model = pytest.mark.parametrize("model", BUILDS)


class Inner(NamedTuple):
    one: Tensor
    other: Tensor


class Outer(NamedTuple):
    first: Tensor
    inner: Inner


def test_a_batch_is_moved_with_all_its_parts() -> None:
    batch = Outer(torch.ones(2), Inner(torch.ones(3), torch.zeros(4, dtype=torch.int64)))
    moved = on_device(batch, torch.device("meta"))
    assert isinstance(moved, Outer)
    assert isinstance(moved.inner, Inner)
    assert [tensor.device.type for tensor in (moved.first, *moved.inner)] == ["meta"] * 3
    assert [len(tensor) for tensor in (moved.first, *moved.inner)] == [2, 3, 4]
    same = on_device(batch, torch.device("cpu"))
    assert same.inner.other.dtype == torch.int64
    assert torch.equal(same.first, batch.first)


@every_model
def test_fresh_weights_depend_on_the_seed_alone(model: str, params: Params, tmp_path: Path) -> None:
    first, again, other = (BUILDS[model](params, tmp_path, seed).model.state_dict() for seed in (0, 0, 1))
    for name, weights in first.items():
        assert torch.equal(weights, again[name])
        # A new seed draws all but what begins at zero or one.
        if len(weights.unique()) > 1:
            assert not torch.equal(weights, other[name]), name


@every_model
def test_parts_of_a_batch_have_its_loss_and_gradients_as_their_mean(model: str, params: Params, tmp_path: Path) -> None:
    objective = BUILDS[model](params, tmp_path, 0)
    initialise(objective.model, seeded(1), embedding_std=1.0)
    weights = list(objective.model.parameters())
    whole = objective.loss(objective.batch(0, range(objective.rows)))
    half = objective.rows // 2
    parts = [objective.loss(objective.batch(0, rows)) for rows in (range(half), range(half, objective.rows))]
    assert not torch.equal(parts[0].total, parts[1].total)
    torch.testing.assert_close(whole.total, (parts[0].total + parts[1].total) / 2)
    for name, term in whole.terms.items():
        torch.testing.assert_close(term, (parts[0].terms[name] + parts[1].terms[name]) / 2)
    of_parts = zip(*(torch.autograd.grad(part.total, weights) for part in parts), strict=True)
    for gradient, (first, second) in zip(torch.autograd.grad(whole.total, weights), of_parts, strict=True):
        torch.testing.assert_close(gradient, (first + second) / 2, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
