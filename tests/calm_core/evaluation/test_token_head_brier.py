"""Brier scores of a CALM with a token head, whose tokens depend on all before them, against enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.evaluation.continuations import token_head_brier
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise

SIZE, BRANCHES = 3, 3


def whole_model(patch_size: int) -> Calm:
    """Weights that all matter."""
    model = Calm(CalmConfig(SIZE, patch_size, 16, BackboneConfig(16, 24, 2, 2, 1), TokenHeadConfig(8, 12, 1)))
    initialise(model, torch.Generator().manual_seed(patch_size), embedding_std=1.0)
    return model.eval().requires_grad_(False)


def enumerated(model: Calm, history: Tensor, following: Tensor) -> Tensor:
    """Exact Brier-1 to Brier-4 [4] after the patches ``history`` [patches, K]; ``following`` [4] are the true tokens.

    Every continuation by whole patches has a pass of its own, without cache and branches.
    """
    head, patch_size = model.head, model.config.patch_size
    assert isinstance(head, TokenHead)
    patches = -(-4 // patch_size)
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=patches * patch_size)))
    texts = torch.cat([history.expand(len(every), -1, -1), every.unflatten(1, (patches, patch_size))], dim=1)
    hidden_states = model(texts[:, :-1])[:, -patches:]
    log_p = (
        head.log_probabilities(hidden_states, texts[:, -patches - 1 : -1], texts[:, -patches:]).double().sum(dim=(1, 2))
    )
    scores = []
    for length in range(1, 5):
        # Probability of the first tokens: the sum over what follows them.
        p = log_p.exp().view(SIZE**length, -1).sum(dim=1)
        right = every[:: SIZE ** (patches * patch_size - length), :length] == following[:length]
        scores.append(2 * p[right.all(dim=1)].sum() - p.square().sum())
    return torch.stack(scores)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5])
def test_scores_are_those_of_all_continuations_on_average(patch_size: int) -> None:
    model, patches = whole_model(patch_size), -(-4 // patch_size)
    text = torch.randint(SIZE, (2, BRANCHES + patches, patch_size), generator=torch.Generator().manual_seed(1))
    wanted = torch.stack(
        [
            torch.stack([enumerated(model, row[: leaf + 1], row[leaf + 1 :].flatten()[:4]) for leaf in range(BRANCHES)])
            for row in text
        ]
    )
    draws = torch.Generator().manual_seed(2)
    found = torch.stack([token_head_brier(model, text, 20, draws).double() for _ in range(40)])
    assert found.shape == (40, 2, BRANCHES, 4)
    error = found.std(dim=0) / 40**0.5
    assert error[..., 1:].min() > 0
    # Nothing before the first token is sampled.
    torch.testing.assert_close(found[..., 0], wanted[..., 0].expand(40, -1, -1), atol=1e-5, rtol=0)
    assert ((found.mean(dim=0) - wanted).abs() <= 4.5 * error + 1e-5).all()
    # The scores differ from place to place by far more.
    assert (wanted.flatten(0, 1).std(dim=0) > 5 * error.amax(dim=(0, 1))).all()


def test_each_sample_position_and_row_has_draws_of_its_own() -> None:
    model = whole_model(2)
    # One text twice: what differs is drawn.
    text = torch.randint(SIZE, (1, 6, 2), generator=torch.Generator().manual_seed(1)).expand(2, -1, -1)
    first, second = token_head_brier(model, text, 1, torch.Generator().manual_seed(0))
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 3], second[:, 3])
