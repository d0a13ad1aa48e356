"""The baseline's loss, of a model that knows nothing and in bfloat16."""

import pytest
import torch

from calm_core.nn.backbone import BackboneConfig
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)


def test_next_token_loss_is_uniform_for_an_ignorant_model() -> None:
    model = Transformer(TransformerConfig(11, BACKBONE))
    model.initialise(torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model.output.weight)
    loss = next_token_loss(model, torch.randint(11, (2, 7)))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


def test_fresh_embeddings_have_unit_scale_and_layers_add_nothing() -> None:
    model = Transformer(TransformerConfig(500, BACKBONE))
    model.initialise(torch.Generator().manual_seed(0))
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    token_ids = torch.randint(500, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.hidden_states(token_ids), model.backbone.norm(model.embedding(token_ids)))


def test_bfloat16_keeps_sums_norms_and_losses_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(TransformerConfig(11, BACKBONE))
    transformer.initialise(generator)
    seen: list[torch.dtype] = []
    for module in transformer.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    token_ids = torch.randint(11, (3, 8), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(transformer, token_ids)
    assert set(seen) == {torch.float32}
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in transformer.parameters() if p.grad is not None)
