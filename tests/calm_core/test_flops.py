import math
from pathlib import Path

import pytest

from calm_core.autoencoder import AutoencoderConfig
from calm_core.backbone import BackboneConfig
from calm_core.calm import CalmConfig
from calm_core.energy_head import EnergyHeadConfig
from calm_core.flops import ModelFlops, calm_flops, counted_calm_flops, counted_transformer_flops, transformer_flops
from calm_core.presets import load_preset
from calm_core.transformer import TransformerConfig

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
    shape = (CalmConfig(), AutoencoderConfig(), CONTEXT, SAMPLES)
    assert_close(calm_flops(*shape), counted_calm_flops(*shape), 0.02)


@pytest.mark.parametrize("scored_targets", [0, 2])
def test_torch_counts_the_same_for_other_shapes(scored_targets: int) -> None:
    backbone = BackboneConfig(96, 160, 3, 6, 2)
    transformer = TransformerConfig(500, backbone)
    assert_close(transformer_flops(transformer, 64), counted_transformer_flops(transformer, 64), 0.02)
    calm = CalmConfig(500, 3, 24, backbone, EnergyHeadConfig(3, 16))
    coder = AutoencoderConfig(500, 3, 48, 80, 24, 3, 3)
    # The paper charges every sample with projecting the hidden state, which the code does once a position; at this
    # small a width that is 3 %.
    shape = (calm, coder, 32, 5, scored_targets)
    assert_close(calm_flops(*shape), counted_calm_flops(*shape), 0.04)
    assert calm_flops(*shape).inference_per_token == counted_calm_flops(*shape).inference_per_token


def test_presets_hold_the_published_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    calm, transformer = load_preset("calm-m"), load_preset("transformer-s")
    coder = AutoencoderConfig.from_params(calm.autoencoder, calm.tokenizer.vocabulary_size)
    assert coder == AutoencoderConfig()
    assert CalmConfig.from_params(calm.calm, coder) == CalmConfig()
    size = transformer.tokenizer.vocabulary_size
    assert TransformerConfig.from_params(transformer.transformer, size) == TransformerConfig()
    tokens = calm.calm.steps * calm.calm.batch_sequences * calm.calm.context_tokens
    assert tokens == pytest.approx(TRAINING_TOKENS, rel=0.05)
