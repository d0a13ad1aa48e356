"""Tokens by the inverse of the running sum of their probabilities, in one step and in two."""

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_core.evaluation import continuations
from calm_core.evaluation.continuations import sample_tokens

SIZES = [1, 5, 63, 64, 65, 1000]


def probabilities(size: int, rows: int) -> Tensor:
    """Peaked ones, of which every other is 0."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size, generator=generator) * 4
    logits[:, 1::2] = -torch.inf
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("least", [0, 1 << 60], ids=["two steps", "one step"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_where_numpy_finds_them(size: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "MANY_PROBABILITIES", least)
    of_tokens = probabilities(size, 400)
    found = sample_tokens(of_tokens.view(20, 20, size), torch.Generator().manual_seed(1)).flatten()
    numbers = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, number, token in zip(of_tokens.double().numpy(), numbers.tolist(), found.tolist(), strict=True):
        sums = np.cumsum(row)
        assert token == np.searchsorted(sums, number * sums[-1], side="right")


@pytest.mark.parametrize("least", [0, 1 << 60], ids=["two steps", "one step"])
@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("size", SIZES)
def test_the_ends_of_the_running_sum_are_tokens_that_there_are(
    size: int, number: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "MANY_PROBABILITIES", least)
    monkeypatch.setattr(
        continuations, "uniform", lambda shape, generator: torch.full(shape, number, dtype=torch.float64)
    )
    of_tokens = probabilities(size, 300)
    of_tokens[::3, :2] = 0
    of_tokens[::3, 2 * (size // 4)] += 0.1
    found = sample_tokens(of_tokens, torch.Generator())
    assert (of_tokens.gather(-1, found[:, None]) > 0).all()
