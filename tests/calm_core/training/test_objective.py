"""Batches are moved as a whole."""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.training.objective import on_device


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
