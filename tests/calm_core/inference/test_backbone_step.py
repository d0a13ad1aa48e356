"""The pass over one position a row against the backbone's own, for every shape, padding and length."""

import pytest
import torch

from calm_core.inference.backbone_step import BackboneStep
from calm_core.nn.backbone import Backbone, BackboneConfig
from calm_core.nn.layers import RMSNorm, initialise


def backbone(heads: int, key_value_heads: int) -> Backbone:
    model = Backbone(BackboneConfig(32, 48, 3, heads, key_value_heads, rope_theta=100.0))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    gains = torch.Generator().manual_seed(1)
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=gains)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_the_backbones_pass_over_the_last_position(heads: int, key_value_heads: int, padded: bool) -> None:
    """Over more steps than a table has positions, behind a prompt; rows with padding against those without any."""
    model = backbone(heads, key_value_heads)
    embeddings = torch.randn(3, 150, 32, generator=torch.Generator().manual_seed(1))
    padding, prompt = (torch.tensor([0, 2, 5]) if padded else None), 6
    cache = model.new_cache()
    keys = torch.arange(prompt)
    mask = None
    if padding is not None:
        causal = keys <= keys[:, None]
        mask = ((causal & (keys >= padding[:, None, None])) | torch.eye(prompt, dtype=torch.bool))[:, None]
    model(embeddings[:, :prompt], cache, mask=mask)
    step = BackboneStep(model, cache, padding)
    found = torch.stack([step(embeddings[:, place]) for place in range(prompt, 150)], dim=1)
    assert cache.length == 150
    for row in range(3):
        unseen = int(padding[row]) if padding is not None else 0
        expected = model(embeddings[row, unseen:][None])[0, prompt - unseen :]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_a_step_begins_a_cache() -> None:
    model = backbone(2, 1)
    embeddings = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    step = BackboneStep(model, model.new_cache())
    found = torch.stack([step(embeddings[:, place]) for place in range(4)], dim=1)
    torch.testing.assert_close(found, model(embeddings), atol=1e-5, rtol=1e-4)
