"""What the autoencoder learns: patches from anywhere, under a loss that is written out by hand."""

from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import AutoencoderDraws
from calm_core.autoencoder.training import AutoencoderObjective, PatchBatch, reconstruction, train_autoencoder
from calm_core.nn.layers import initialise
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.training.loop import train
from tests.calm_core.training.tiny_trainings import LATENT, VOCABULARY, autoencoder_section, seeded, stream_of


def objective_of(
    params: Params, folder: Path, token_ids: Tensor, vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any
) -> AutoencoderObjective:
    """With weights that all matter."""
    section = autoencoder_section(params, **changes)
    objective = AutoencoderObjective(section, stream_of(folder, token_ids, vocabulary), vocabulary, seed)
    initialise(objective.model, seeded(1), embedding_std=1.0)
    return objective


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_begin_anywhere(patch_size: int, params: Params, tmp_path: Path) -> None:
    # Each token is its own position in the stream.
    objective = objective_of(params, tmp_path, torch.arange(45), patch_size=patch_size, batch_patches=500)
    patches = torch.cat([objective.batch(step, range(500)).token_ids for step in range(4)])
    starts = patches[:, 0]
    assert torch.equal(patches, starts[:, None] + torch.arange(patch_size))
    counts = starts.bincount()
    assert len(counts) == 45 - patch_size + 1
    assert scipy.stats.chisquare(counts).pvalue > 0.001
    named = ", ".join(map(str, objective.batch(1, range(8)).token_ids[:, 0].tolist()))
    assert objective.describe_batch(1) == f"patches from tokens {named} and 492 more of the training split"


def test_rows_are_the_same_however_a_batch_is_divided(params: Params, tmp_path: Path) -> None:
    # Noise is drawn for 256 patches at a time; parts begin and end inside, and span two or three times as many.
    objective = objective_of(params, tmp_path, torch.arange(45), batch_patches=700)
    whole = objective.batch(3, range(700))
    for rows in (range(0, 350), range(350, 700), range(100, 130), range(255, 257), range(200, 650), range(512, 700)):
        part = objective.batch(3, rows)
        assert torch.equal(part.token_ids, whole.token_ids[rows.start : rows.stop])
        for name in AutoencoderDraws._fields:
            assert torch.equal(getattr(part.draws, name), getattr(whole.draws, name)[rows.start : rows.stop])


def test_draws_are_anew_in_each_place_step_and_seed(params: Params, tmp_path: Path) -> None:
    objective = objective_of(params, tmp_path, torch.arange(45), batch_patches=700)
    token_ids, draws = objective.batch(0, range(700))
    assert [tuple(values.shape) for values in draws] == [(700, LATENT), (700, 2), (700, LATENT)]
    assert scipy.stats.kstest(draws.noise.flatten().numpy(), "norm").pvalue > 0.001
    for uniform in draws[1:]:
        assert scipy.stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 0.001
    for values in draws:
        assert len(values.flatten().unique()) > 0.99 * values.numel()
    other_seed = objective_of(params, tmp_path, torch.arange(45), seed=1, batch_patches=700)
    for other in (objective.batch(1, range(700)), other_seed.batch(0, range(700))):
        assert not torch.equal(other.token_ids, token_ids)
        assert not any(torch.equal(a, b) for a, b in zip(other.draws, draws, strict=True))


@pytest.mark.parametrize("patch_size", [1, 4])
def test_loss_by_hand(patch_size: int, params: Params, tmp_path: Path) -> None:
    changes = {"kl_weight": 0.3, "kl_clamp": 0.4, "token_dropout": 0.35, "latent_dropout": 0.25}
    objective = objective_of(params, tmp_path, torch.arange(1, 46), patch_size=patch_size, batch_patches=64, **changes)
    batch = objective.batch(0, range(64))
    assert isinstance(batch, PatchBatch)
    loss = objective.loss(batch)

    (noise, token_uniform, latent_uniform), model = batch.draws, objective.model
    shown = torch.where(token_uniform < 0.35, 0, batch.token_ids)
    assert 0 < (shown == 0).double().mean() < 0.6
    mean, log_std = model.encode(shown)
    latents = torch.where(latent_uniform < 0.25, 0, (mean + log_std.exp() * noise) / 0.75)
    cross_entropy = F.cross_entropy(model.logits(latents).flatten(0, 1), batch.token_ids.flatten())
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0))
    assert 0.05 < (divergence < 0.4).double().mean() < 0.95
    kl = divergence.clamp(min=0.4).sum(dim=-1).mean()
    expected = patch_size * cross_entropy + 0.3 * kl
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.terms, {"cross_entropy": cross_entropy.detach(), "kl": kl.detach()})
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss.total, weights)
    for name, of_loss, by_hand in zip(names, found, torch.autograd.grad(expected, weights), strict=True):
        assert by_hand.any(), name
        torch.testing.assert_close(of_loss, by_hand, rtol=1e-4, atol=1e-5)


def test_its_own_section_trains_it(params: Params, tmp_path: Path) -> None:
    tokens, section = stream_of(tmp_path, torch.arange(45)), autoencoder_section(params, steps=3, warmup_steps=0)
    seeded_params = params.model_copy(update={"autoencoder": section, "seed": 3})
    trained = train_autoencoder(seeded_params, tokens, VOCABULARY)
    expected = train(AutoencoderObjective(section, tokens, VOCABULARY, 3), section, params.runtime)
    for name, weight in expected.named_parameters():
        assert torch.equal(trained.get_parameter(name), weight), name


def test_reconstruction_counts_the_tokens_that_come_back(params: Params, tmp_path: Path) -> None:
    token_ids = torch.arange(45)
    objective = objective_of(params, tmp_path, token_ids, patch_size=1, batch_patches=64)
    model, patches = objective.model, token_ids[:, None]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        objective.loss(objective.batch(step, range(64))).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    measured = reconstruction(model, stream_of(tmp_path, token_ids), 5)
    with torch.no_grad():
        mean, log_std = model.encode(patches)
        noise = torch.randn(mean.shape, generator=generator(5, "train_autoencoder", "latent noise"))
        latents = (mean, mean + 0.3 * noise)
        shares = [float((model.logits(x).argmax(dim=-1) == patches).double().mean()) for x in latents]
    assert 0.1 < shares[0] < 1
    assert shares[1] != shares[0]
    assert [measured.token_accuracy, measured.token_accuracy_noisy] == pytest.approx(shares)
    assert measured.posterior_std == pytest.approx(float(log_std.exp().mean()), rel=1e-5)
    assert measured.tokens == 45
