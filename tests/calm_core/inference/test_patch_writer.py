"""Patches by the writer against tokens drawn from the head's own logits, of every K and depth."""

import pytest
import torch

from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.evaluation.continuations import sample_tokens
from calm_core.inference.patch_writer import PatchWriter
from calm_core.nn.layers import RMSNorm, initialise


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(("patch_size", "layers"), [(1, 1), (2, 1), (4, 1), (3, 2)])
def test_a_patch_is_drawn_from_the_heads_own_distribution(patch_size: int, layers: int, temperature: float) -> None:
    head = TokenHead(TokenHeadConfig(12, 16, layers), 50, patch_size, 10).requires_grad_(False)
    initialise(head, torch.Generator().manual_seed(0), embedding_std=1.0)
    gains = torch.Generator().manual_seed(1)
    for norm in (module for module in head.modules() if isinstance(module, RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=gains)
    torch.nn.init.uniform_(head.from_hidden_state.bias, generator=gains)
    hidden_states, read = torch.randn(300, 10, generator=gains), torch.randint(50, (300, patch_size), generator=gains)
    found = PatchWriter(head)(hidden_states, read, temperature, torch.Generator().manual_seed(2))

    expected, draws = read, torch.Generator().manual_seed(2)
    for _ in range(patch_size):
        probabilities = (head.logits(hidden_states, expected).float() / temperature).softmax(dim=-1)
        expected = torch.cat([expected, sample_tokens(probabilities, draws)[:, None]], dim=1)
    # A draw between two tokens may fall on either side for rounding.
    assert (found == expected[:, patch_size:]).all(dim=1).float().mean() > 0.99
