import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.training import manifold_distance
from calm_core.inference import decoding, few_rows
from calm_core.inference.decoding import Sampling, align_prompts, calm_steps, transformer_steps
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.known_models import bigram_calm, bigram_transformer
from tests.support.threads import operators_of

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
TABLE = np.array([[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.1], [0.2, 0.3, 0.1, 0.4], [0.45, 0.05, 0.45, 0.05]])


def test_transformer_at_low_temperature_is_greedy() -> None:
    model = Transformer(TransformerConfig(13, BACKBONE))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prompts = align_prompts(prompt.tolist(), 1, 0)
    steps = transformer_steps(model, prompts, Sampling(1e-4), torch.Generator().manual_seed(0))
    generated = torch.cat([next(steps).token_ids for _ in range(6)], dim=1)
    greedy = prompt
    for _ in range(6):
        greedy = torch.cat([greedy, model(greedy)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, greedy[:, 3:])


@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 5e-324])
@pytest.mark.parametrize("patch_size", [0, 2])
def test_the_lowest_temperatures_take_the_likeliest_token(patch_size: int, temperature: float) -> None:
    """Of a Transformer (K 0 here) and of a token head, whose logits divided by it are beyond float32."""
    if patch_size:
        model = bigram_calm(TABLE, patch_size)
        steps = calm_steps(
            model, None, align_prompts([[0], [1]], patch_size, 0), Sampling(temperature), torch.Generator()
        )
    else:
        steps = transformer_steps(
            bigram_transformer(TABLE), align_prompts([[0], [1]], 1, 0), Sampling(temperature), torch.Generator()
        )
    found = torch.cat([next(steps).token_ids for _ in range(2)], dim=1)[:, :2]
    likeliest = TABLE.argmax(axis=1)
    assert found.tolist() == [[likeliest[start], likeliest[likeliest[start]]] for start in (0, 1)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_calm_generates_whole_patches(temperature: float) -> None:
    autoencoder = Autoencoder(AutoencoderConfig(13, 3, 16, 24, 8))
    model = Calm(CalmConfig(13, 3, 8, BACKBONE, EnergyHeadConfig(1, 4)))
    for part in (autoencoder, model):
        part.initialise(torch.Generator().manual_seed(0))
    prompts = align_prompts([[1, 2, 3, 4, 5, 6]], 3, 0)

    def generate(seed: int) -> Tensor:
        draws = torch.Generator().manual_seed(seed)
        steps = calm_steps(model, autoencoder, prompts, Sampling(temperature), draws)
        return torch.cat([next(steps).token_ids for _ in range(3)], dim=1)

    assert generate(1).shape == (1, 9)
    assert torch.equal(generate(1), generate(1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_a_token_head_draws_each_token_from_its_sharpened_distribution(patch_size: int, temperature: float) -> None:
    """Four tokens after prompts of several lengths, the shorter ones behind padding; chains of the table's rows."""
    repeats, lasts = 400, [0, 1, 3, 2]
    prompts = [[0], [2, 3, 1], [0, 1, 2, 0, 3], [3, 3, 1, 1, 0, 2, 2]] * repeats
    draws = torch.Generator().manual_seed(0)
    aligned = align_prompts(prompts, patch_size, 0)
    steps = calm_steps(bigram_calm(TABLE, patch_size), None, aligned, Sampling(temperature), draws)
    taken = [next(steps) for _ in range(-(-4 // patch_size))]
    assert all(step.exact and step.finished.all() and step.reached.all() for step in taken)
    found = torch.cat([step.token_ids for step in taken], dim=1)[:, :4].numpy()
    sharpened = TABLE ** (1 / temperature)
    sharpened /= sharpened.sum(axis=1, keepdims=True)
    before = np.concatenate([np.tile(lasts, repeats)[:, None], found[:, :3]], axis=1)
    for place in range(4):
        for last in range(4):
            drawn = found[before[:, place] == last, place]
            counts = np.bincount(drawn, minlength=4)
            assert scipy.stats.chisquare(counts, sharpened[last] * len(drawn)).pvalue > 1e-4, (place, last)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_softmax_sampler_draws_from_the_decoders_softmax(temperature: float) -> None:
    """A head that was never trained gives the latent 0 alone, so P is the decoder's softmax there."""
    autoencoder = Autoencoder(AutoencoderConfig(4, 2, 16, 24, 8))
    model = Calm(CalmConfig(4, 2, 8, BACKBONE, EnergyHeadConfig(1, 4)))
    for part in (autoencoder, model):
        part.initialise(torch.Generator().manual_seed(0))
    prompts = align_prompts([[1, 2, 3, 0]] * 4000, 2, 0)
    sampling = Sampling(temperature, "softmax", latents=3)
    with torch.no_grad():
        autoencoder.decoder.from_latent.bias.fill_(1.0)  # away from equal logits
        step = next(calm_steps(model, autoencoder, prompts, sampling, torch.Generator().manual_seed(1)))
        expected = (autoencoder.logits(torch.zeros(8)) / temperature).softmax(dim=-1).double()
    assert step.exact == (temperature == 1)
    for position in range(2):
        assert expected[position].max() > 1.5 * expected[position].min()
        counts = torch.bincount(step.token_ids[:, position], minlength=4)
        of_position = (expected[position] / expected[position].sum()).numpy()
        assert scipy.stats.chisquare(counts, of_position * 4000).pvalue > 1e-4


def test_distance_from_the_manifold() -> None:
    autoencoder = Autoencoder(AutoencoderConfig(13, 3, 16, 24, 8))
    autoencoder.initialise(torch.Generator().manual_seed(0))
    latents = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    on_manifold = autoencoder.encode(autoencoder.decode(latents)).mean
    expected = torch.stack([(a - b).norm() / math.sqrt(8) for a, b in zip(latents, on_manifold, strict=True)])
    torch.testing.assert_close(manifold_distance(autoencoder, latents), expected)


@pytest.mark.parametrize(
    ("prompts", "rows"), [([[1, 2, 3]] * 4, 1), ([[1, 2, 3], [1, 2, 4]] * 2, 4), ([[0, 0, 3], [3]], 2)]
)
def test_a_prompt_of_all_texts_is_read_once(prompts: list[list[int]], rows: int) -> None:
    model = Transformer(TransformerConfig(13, BACKBONE))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    steps = transformer_steps(model, align_prompts(prompts, 1, 0), Sampling(1e-4), torch.Generator().manual_seed(0))
    generated = torch.cat([next(steps).token_ids for _ in range(3)], dim=1)
    assert seen == [rows]
    alone = [transformer_steps(model, align_prompts([one], 1, 0), Sampling(1e-4), torch.Generator()) for one in prompts]
    assert generated.tolist() == [[int(next(steps).token_ids) for _ in range(3)] for steps in alone]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [(Sampling(), 1), (Sampling(0.5, draws=4), 1), (Sampling(0.5, draws=2000), 2), (Sampling(0.5, "softmax"), 1)],
)
def test_steps_of_a_small_model_have_one_thread_unless_texts_are_shared(sampling: Sampling, expected: int) -> None:
    """Who takes the steps has as many threads as before."""
    autoencoder = Autoencoder(AutoencoderConfig(13, 3, 16, 24, 8))
    model = Calm(CalmConfig(13, 3, 8, BACKBONE, EnergyHeadConfig(1, 4)))
    for part in (autoencoder, model):
        part.initialise(torch.Generator().manual_seed(0))
    seen = []
    model.patch_embedding.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with operators_of(2):
        prompts, draws = align_prompts([[1, 2, 3]], 3, 0), torch.Generator().manual_seed(0)
        steps = calm_steps(model, autoencoder, prompts, sampling, draws)
        for _ in range(2):
            next(steps)
            assert torch.get_num_threads() == 2
    assert seen == [expected] * 2


def test_steps_of_a_large_model_multiply_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes the steps multiplies as ever."""
    model = Transformer(TransformerConfig(4096, BackboneConfig(256, 16, 1, 2, 1))).requires_grad_(False)
    seen: list[str] = []
    real = few_rows._linear
    monkeypatch.setattr(few_rows, "_linear", lambda *args: (seen.append("few rows"), real(*args))[1])
    monkeypatch.setattr(decoding, "threads_side_by_side", lambda *_: 1)
    model.initialise(torch.Generator().manual_seed(0))
    steps = transformer_steps(model, align_prompts([[1, 2]], 1, 0), Sampling(), torch.Generator().manual_seed(0))
    for _ in range(2):
        next(steps)
        seen.append("taken")
        model.output(torch.zeros(1, 256))
    assert seen == ["few rows", "taken", "few rows", "taken"]
