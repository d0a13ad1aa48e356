"""Our autoencoder, backbone, energy head and losses against numbers recorded from the reference implementation."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calm_core.autoencoder import Autoencoder, AutoencoderConfig, clipped_kl
from calm_core.backbone import BackboneConfig
from calm_core.brier import brier_from_samples
from calm_core.calm import Calm, CalmConfig, energy_loss
from calm_core.energy_head import EnergyHeadConfig

REFERENCE = Path(__file__).parents[1] / "data/reference"
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}

AUTOENCODER_NAMES = [
    (r"embed_tokens", "embedding"),
    (r"encoder_layers\.0", "token_layers.0"),
    (r"encoder_layers\.1", "patch_layers.0"),
    (r"decoder_layers\.0", "patch_layers.0"),
    (r"decoder_layers\.1", "token_layers.0"),
    (r"layernorm", "norm"),
    (r"(gate|up|down)_proj", r"\1"),
    (r"squeeze_layer", "squeeze"),
    (r"expand_layer", "expand"),
    (r"hidden_to_latent", "to_posterior"),
    (r"latent_to_hidden", "from_latent"),
]
CALM_NAMES = [
    (r"transformer\.embed_tokens", "patch_embedding.embedding"),
    (r"embed_proj", "patch_embedding.projection"),
    (r"transformer\.", "backbone."),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "mlp_norm"),
    (r"self_attn\.q_proj", "attention.query"),
    (r"self_attn\.k_proj", "attention.key"),
    (r"self_attn\.v_proj", "attention.value"),
    (r"self_attn\.o_proj", "attention.output"),
    (r"layers\.(\d)\.mlp\.(gate|up|down)_proj", r"layers.\1.mlp.\2"),
    (r"generative_head\.mlp_blocks\.(\d)\.in_ln", r"head.blocks.\1.norm"),
    (r"generative_head\.mlp_blocks\.(\d)\.linears", r"head.blocks.\1.mlp"),
    (r"generative_head\.mlp_blocks\.(\d)\.down_proj", r"head.blocks.\1.down"),
    (r"generative_head\.final_layer\.in_ln", "head.norm"),
    (r"generative_head\.final_layer\.linears", "head.output"),
    (r"generative_head\.noise_embd", "head.noise_projection"),
    (r"generative_head\.norm_noise", "head.noise_norm"),
    (r"generative_head\.hidden_embd", "head.condition_projection"),
    (r"generative_head\.norm_hidden", "head.condition_norm"),
]


def renamed(weights: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    result = {}
    for name, weight in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = weight
    return result


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    weights = load_file(REFERENCE / "energy.safetensors")
    own = {name.removeprefix("ae_model."): weight for name, weight in weights.items() if name.startswith("ae_model.")}
    model = Autoencoder(AutoencoderConfig(96, 4, 48, 96, 16, 2, 2))
    model.load_state_dict(renamed(own, AUTOENCODER_NAMES))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calm() -> Calm:
    weights = load_file(REFERENCE / "energy.safetensors")
    own = {name: weight for name, weight in weights.items() if not name.startswith("ae_model.")}
    model = Calm(CalmConfig(96, 4, 16, BackboneConfig(64, 128, 2, 4, 4), EnergyHeadConfig(2, 16)))
    model.load_state_dict(renamed(own, CALM_NAMES))
    return model.eval().requires_grad_(False)


def patches(expected: dict[str, Tensor]) -> Tensor:
    return expected["input_ids"].unflatten(-1, (-1, 4))


def test_autoencoder(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    posterior = autoencoder.encode(patches(expected))
    torch.testing.assert_close(torch.cat(posterior, dim=-1), expected["ae.encoder_out"], **TOLERANCE)
    logits = autoencoder.logits(posterior.mean).flatten(1, 2)
    torch.testing.assert_close(logits, expected["ae.logits_of_mean"], **TOLERANCE)


def test_autoencoder_objective(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    posterior = autoencoder.encode(patches(expected))
    kl = clipped_kl(posterior, kl_clamp=0.5).mean()
    torch.testing.assert_close(kl, expected["ae.kl_clipped"], **TOLERANCE)
    noise = expected["ae.eval_eps"].view_as(posterior.mean)
    logits = autoencoder.logits(posterior.sample(noise)).flatten(0, 2)
    cross_entropy = torch.nn.functional.cross_entropy(logits, expected["input_ids"].flatten())
    torch.testing.assert_close(cross_entropy, expected["ae.eval_loss"], **TOLERANCE)


def test_backbone(calm: Calm, expected: dict[str, Tensor]) -> None:
    embeddings = calm.patch_embedding(patches(expected)[:, :5])
    torch.testing.assert_close(embeddings, expected["energy.inputs_embeds"], **TOLERANCE)
    hidden_states = calm(patches(expected)[:, :5])
    torch.testing.assert_close(hidden_states, expected["energy.hidden_states"], **TOLERANCE)


def test_energy_head_samples(calm: Calm, autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    samples = calm.head(expected["energy.hidden_states"], expected["energy.sample_draw_000"] - 0.5)
    torch.testing.assert_close(samples, expected["energy.sample"], **TOLERANCE)
    assert torch.equal(autoencoder.decode(samples), expected["energy.sample_tokens"])


def test_energy_loss(calm: Calm, autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    posterior = autoencoder.encode(patches(expected)[:, 1:].flatten(0, 1))
    targets = posterior.sample(expected["energy.train_draw_1"])
    hidden_states = expected["energy.hidden_states"].flatten(0, 1)
    samples = calm.head(hidden_states, expected["energy.train_draw_0"] - 0.5)
    torch.testing.assert_close(energy_loss(samples, targets).total, expected["energy.train_loss"], **TOLERANCE)


def test_brier(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    samples = autoencoder.decode(expected["energy.brier_mixed_predictions"])
    targets = expected["energy.brier_mixed_targets"].unflatten(-1, (-1, 4))
    scores = brier_from_samples(samples, targets).mean(dim=(0, 1))
    torch.testing.assert_close(scores, expected["energy.brier_mixed"], atol=1e-6, rtol=0.0)
