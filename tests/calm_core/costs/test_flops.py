import math
from typing import Literal

import pytest

from calm_core.autoencoder.model import AutoencoderConfig
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.denoiser import TIME_FREQUENCIES
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.calm.training import calm_config
from calm_core.costs.flops import (
    ModelFlops,
    autoencoder_flops,
    calm_flops,
    counted_autoencoder_flops,
    counted_calm_flops,
    counted_transformer_flops,
    token_head_parameters,
    transformer_flops,
)
from calm_core.nn.backbone import BackboneConfig
from calm_core.presets import load_preset
from calm_core.transformer.model import TransformerConfig
from calm_core.transformer.training import transformer_config
from tests import ROOT

CONTEXT, SAMPLES, TRAINING_TOKENS = 2048, 8, 5.0e11


def printed(flops: ModelFlops) -> tuple[int, str, str]:
    """As the paper prints them: whole millions of parameters, FLOPs to two digits."""
    millions = math.floor(flops.parameters / 1e6)
    return (
        millions,
        f"{flops.training_per_token * TRAINING_TOKENS / 1e20:.1f}",
        f"{flops.inference_per_token / 1e8:.1f}",
    )


def test_published_figures() -> None:
    transformer = transformer_flops(TransformerConfig(), CONTEXT)
    calm = calm_flops(CalmConfig(), AutoencoderConfig(), CONTEXT, SAMPLES)
    assert printed(transformer) == (281, "6.6", "4.4")
    assert printed(calm) == (371, "3.7", "2.9")
    assert f"{1 - calm.training_per_token / transformer.training_per_token:.0%}" == "44%"
    assert f"{1 - calm.inference_per_token / transformer.inference_per_token:.0%}" == "34%"


def assert_close(analytic: ModelFlops, counted: ModelFlops, tolerance: float) -> None:
    assert analytic.training_per_token == pytest.approx(counted.training_per_token, rel=tolerance)
    assert analytic.inference_per_token == pytest.approx(counted.inference_per_token, rel=tolerance)


def test_torch_counts_the_same_for_the_published_models() -> None:
    assert_close(
        transformer_flops(TransformerConfig(), CONTEXT), counted_transformer_flops(TransformerConfig(), CONTEXT), 0.02
    )
    analytic = calm_flops(CalmConfig(), AutoencoderConfig(), CONTEXT, SAMPLES)
    counted = counted_calm_flops(CalmConfig(), AutoencoderConfig(), CONTEXT, SAMPLES)
    assert counted.inference_per_token == pytest.approx(analytic.inference_per_token, rel=0.02)
    # Training does without 7 % that the paper charges for multiplying a condition once a sample.
    assert counted.training_per_token == pytest.approx(0.93 * analytic.training_per_token, rel=0.01)


BACKBONE = BackboneConfig(96, 160, 3, 6, 2)
CODER = AutoencoderConfig(500, 3, 48, 80, 24, 3, 3)
HEADS = [
    EnergyHeadConfig(3, 16),
    DiffusionHeadConfig(3, sampling_steps=4),
    FlowHeadConfig(3, "euler", 4),
    FlowHeadConfig(3, "midpoint", 4),
]


def spared(config: CalmConfig, samples: int) -> int:
    """FLOPs of a position's training that the paper's accounting charges and the code does without.

    Nobody asks for the gradient of an input that no parameter made, and the energy head multiplies a hidden state once,
    not once a sample. It does charge nothing for distances to targets, here those to one pair.
    """
    size, latent_size, head = config.backbone.hidden_size, config.latent_size, config.head
    if isinstance(head, EnergyHeadConfig):
        flops = 2 * samples * head.noise_size * size + 6 * (samples - 1) * (1 + head.blocks) * size**2
        flops -= (4 * samples + 2) * latent_size
    else:
        flops = 2 * samples * (TIME_FREQUENCIES + latent_size) * size
    return flops + (4 * latent_size * size if config.input == "latents" else 0)


def assert_difference(config: CalmConfig, samples: int, scored_targets: int) -> None:
    analytic = calm_flops(config, CODER, 32, samples, scored_targets)
    counted = counted_calm_flops(config, CODER, 32, samples, scored_targets)
    assert analytic.parameters == counted.parameters
    assert analytic.inference_per_token == counted.inference_per_token
    difference = config.patch_size * (analytic.training_per_token - counted.training_per_token)
    assert difference == pytest.approx(spared(config, samples), rel=1e-9)


def test_torch_counts_the_same_for_another_transformer() -> None:
    transformer = TransformerConfig(500, BACKBONE)
    assert transformer_flops(transformer, 64) == counted_transformer_flops(transformer, 64)


def test_torch_counts_the_same_for_the_autoencoder() -> None:
    for config in (CODER, AutoencoderConfig()):
        analytic, counted = autoencoder_flops(config), counted_autoencoder_flops(config)
        assert analytic == counted


@pytest.mark.parametrize("inputs", ["tokens", "latents"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(map(str, vars(head).values())))
def test_torch_counts_the_same_for_every_head(head: AnyHeadConfig, inputs: Literal["tokens", "latents"]) -> None:
    config = CalmConfig(500, 3, 24, BACKBONE, head, inputs)
    assert_difference(config, samples=5, scored_targets=0)


@pytest.mark.parametrize("patch_size", [1, 3, 8])
@pytest.mark.parametrize("head", [TokenHeadConfig(), TokenHeadConfig(40, 72, 1), TokenHeadConfig(56, 24, 3)])
def test_torch_counts_the_same_for_token_heads(head: TokenHeadConfig, patch_size: int) -> None:
    config = CalmConfig(500, patch_size, 96, BACKBONE, head)
    analytic, counted = calm_flops(config, CODER, 32, 5), counted_calm_flops(config, CODER, 32, 5)
    assert analytic == counted
    # A token of the first place reads the hidden state and the patch before, the last all others of its own as well.
    size = head.hidden_size
    reads = sum(96 * size + (patch_size + place) * size**2 for place in range(patch_size))
    writes = patch_size * (head.layers * 3 * size * head.intermediate_size + 500 * size)
    assert token_head_parameters(head, config) == reads + writes


def test_torch_counts_the_same_for_scored_hidden_states() -> None:
    assert_difference(CalmConfig(500, 3, 24, BACKBONE, EnergyHeadConfig(3, 16)), samples=5, scored_targets=2)


def test_presets_hold_the_published_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calm, transformer = load_preset("calm-m"), load_preset("transformer-s")
    coder = autoencoder_config(calm.autoencoder, calm.tokenizer.vocabulary_size)
    assert coder == AutoencoderConfig()
    assert calm_config(calm.calm, coder) == CalmConfig()
    size = transformer.tokenizer.vocabulary_size
    assert transformer_config(transformer.transformer, size) == TransformerConfig()
    tokens = calm.calm.steps * calm.calm.batch_sequences * calm.calm.context_tokens
    assert tokens == pytest.approx(TRAINING_TOKENS, rel=0.05)
