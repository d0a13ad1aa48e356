"""The backbone against transformers' Llama, and every way of calling it against the plain causal pass."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from calm_core.evaluation.continuations import branch_mask
from calm_core.nn.backbone import Backbone, BackboneConfig
from calm_core.nn.layers import initialise

NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def backbone(key_value_heads: int = 2, norm_epsilon: float = 1e-6) -> Backbone:
    model = Backbone(BackboneConfig(32, 48, 3, 4, key_value_heads, norm_epsilon=norm_epsilon))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("key_value_heads", "norm_epsilon"), [(1, 1e-6), (2, 0.1), (4, 1e-6)])
def test_llama_of_transformers(key_value_heads: int, norm_epsilon: float) -> None:
    ours = backbone(key_value_heads, norm_epsilon)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        rms_norm_eps=norm_epsilon,
    )
    theirs = LlamaModel(config).eval()
    weights = {}
    for name, weight in ours.state_dict().items():
        for own, other in NAMES.items():
            name = name.replace(own, other)
        weights[name] = weight
    theirs.load_state_dict(weights, strict=False)
    embeddings = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    expected = theirs(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(ours(embeddings), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_a_shared_head_learns_what_its_copies_would_together(key_value_heads: int) -> None:
    shared, copies = backbone(key_value_heads), backbone(4)
    shapes = (key_value_heads, 8, 32), (key_value_heads, 4 // key_value_heads, 8, 32)
    weights = shared.state_dict()
    for name, weight in weights.items():
        if "attention.key" in name or "attention.value" in name:
            weight = weight.view(shapes[0]).repeat_interleave(4 // key_value_heads, dim=0).flatten(0, 1)
        copies.get_parameter(name).copy_(weight)
    embeddings = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    for model in (shared, copies):
        model.requires_grad_(True)(embeddings).pow(3).sum().backward()
    for name, parameter in shared.named_parameters():
        expected = copies.get_parameter(name).grad
        assert expected is not None
        if expected.shape != parameter.shape:
            expected = expected.view(shapes[1]).sum(dim=1).flatten(0, 1)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


def test_cache_in_pieces_of_any_length() -> None:
    model = backbone()
    embeddings = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    cache = model.new_cache()
    pieces = [model(piece, cache) for piece in embeddings.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(embeddings), atol=1e-5, rtol=1e-5)
    assert cache.length == 9


def test_branches_see_their_own_past_alone() -> None:
    model = backbone()
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randn(2, 7, 32, generator=generator)
    steps = torch.randn(3, 2, 4, 32, generator=generator)
    leaves = torch.tensor([0, 2, 3, 6])
    cache = model.new_cache()
    model(prefix, cache)
    for step in range(3):
        mask = branch_mask(leaves, 7, step + 1)
        together = model(steps[step], cache, leaves + 1 + step, mask)
        for branch, leaf in enumerate(leaves.tolist()):
            alone = torch.cat([prefix[:, : leaf + 1], steps[: step + 1, :, branch].transpose(0, 1)], dim=1)
            torch.testing.assert_close(together[:, branch], model(alone)[:, -1], atol=1e-5, rtol=1e-5)
