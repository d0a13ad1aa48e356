import math

import pytest
import torch

from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.backbone import BackboneConfig
from calm_core.calm import Calm, CalmConfig
from calm_core.calm_training import manifold_distance
from calm_core.energy_head import EnergyHeadConfig
from calm_core.generation import generate_with_calm, generate_with_transformer
from calm_core.layers import initialise
from calm_core.temperature import temperature_choice
from calm_core.transformer import Transformer, TransformerConfig

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)


def frequencies(temperature: float, draws: int, rows: int = 20_000) -> torch.Tensor:
    distribution = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(distribution, draws * rows, replacement=True, generator=generator)
    chosen = temperature_choice(samples.view(draws, rows, 1), temperature, generator)
    return torch.bincount(chosen.flatten(), minlength=3) / rows


def test_temperature_one_is_plain_sampling() -> None:
    expected = torch.tensor([0.5, 0.3, 0.2])
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert torch.all((frequencies(1.0, 20) - expected).abs() < 4 * error)


@pytest.mark.parametrize("temperature", [0.5, 1 / 3, 0.4])
def test_temperature_sharpens_towards_the_power(temperature: float) -> None:
    power = torch.tensor([0.5, 0.3, 0.2]) ** (1 / temperature)
    expected = power / power.sum()
    few, many = frequencies(temperature, 6), frequencies(temperature, 200, rows=4000)
    assert (many - expected).abs().max() < 0.03
    assert (many - expected).abs().max() < (few - expected).abs().max()


def test_temperature_falls_back_when_nothing_repeats() -> None:
    samples = torch.arange(5).view(5, 1, 1)
    chosen = [temperature_choice(samples, 0.1, torch.Generator().manual_seed(seed)).item() for seed in range(50)]
    assert set(chosen) == set(range(5))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, math.nan])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="0 < temperature <= 1"):
        temperature_choice(torch.zeros(2, 1, 1), temperature, torch.Generator())


def test_transformer_at_low_temperature_is_greedy() -> None:
    model = Transformer(TransformerConfig(13, BACKBONE))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    generated = generate_with_transformer(model, prompt, 6, 1e-4, torch.Generator().manual_seed(0))
    greedy = prompt
    for _ in range(6):
        greedy = torch.cat([greedy, model(greedy)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, greedy[:, 3:])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_calm_generates_whole_patches_cut_to_length(temperature: float) -> None:
    autoencoder = Autoencoder(AutoencoderConfig(13, 3, 16, 24, 8))
    model = Calm(CalmConfig(13, 3, 8, BACKBONE, EnergyHeadConfig(1, 4)))
    for part in (autoencoder, model):
        part.initialise(torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6]])
    first = generate_with_calm(model, autoencoder, prompt, 7, temperature, torch.Generator().manual_seed(1))
    again = generate_with_calm(model, autoencoder, prompt, 7, temperature, torch.Generator().manual_seed(1))
    assert first.shape == (1, 7)
    assert torch.equal(first, again)


def test_distance_from_the_manifold() -> None:
    autoencoder = Autoencoder(AutoencoderConfig(13, 3, 16, 24, 8))
    autoencoder.initialise(torch.Generator().manual_seed(0))
    latents = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    on_manifold = autoencoder.encode(autoencoder.decode(latents)).mean
    expected = torch.stack([(a - b).norm() / math.sqrt(8) for a, b in zip(latents, on_manifold, strict=True)])
    torch.testing.assert_close(manifold_distance(autoencoder, latents), expected)
