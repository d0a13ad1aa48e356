"""The partition of latents into equal patches, against decoding all of them."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.head import HeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.inference import equal_patches
from calm_core.inference.decoding import Sampling, align_prompts, calm_steps
from calm_core.inference.temperature import batch_temperature
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from tests.support.threads import operators_of


def autoencoder(patch_size: int) -> Autoencoder:
    model = Autoencoder(AutoencoderConfig(5, patch_size, 16, 24, 8))
    model.initialise(torch.Generator().manual_seed(0))
    return model


def same(numbers: Tensor) -> Tensor:
    """Which of ``numbers`` [N, rows] are equal in a row, [N, N, rows] bool."""
    return numbers[:, None] == numbers[None]


@torch.no_grad()
@pytest.mark.parametrize("at_once", [4096, 7])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_latents_are_parted_as_their_patches_are(
    patch_size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_patches, "rows_at_once", lambda *_: at_once)
    model = autoencoder(patch_size)
    latents = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(1))
    patches = model.decode(latents)
    expected = (patches[:, None] == patches[None]).all(dim=-1)
    # Pairs of every kind: equal, equal in the positions that are looked at first alone, and different.
    assert 0.01 < expected.float().mean() < 0.5
    assert torch.equal(same(equal_patches.equal_patches(model, latents)), expected)


@torch.no_grad()
def test_positions_are_decoded_only_for_latents_with_a_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    model = autoencoder(3)
    latents = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(1))
    decoded, looked_at = model.decode(latents), []
    real = equal_patches.tokens_at

    def counting(model: Autoencoder, states: Tensor, position: int) -> Tensor:
        looked_at.append((position, len(states)))
        return real(model, states, position)

    monkeypatch.setattr(equal_patches, "tokens_at", counting)
    equal_patches.equal_patches(model, latents)
    expected = []
    for position in (2, 1, 0):
        known = decoded[..., position + 1 :]
        partners = (known[:, None] == known[None]).all(dim=-1).sum(dim=0) > 1
        expected.append((position, int(partners.sum())))
    assert looked_at == expected


@torch.no_grad()
def test_latents_without_partners_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def different(model: Autoencoder, states: Tensor, position: int) -> Tensor:
        looked_at.append(position)
        return torch.arange(len(states)) // 2  # of two rows that take turns

    monkeypatch.setattr(equal_patches, "tokens_at", different)
    numbers = equal_patches.equal_patches(autoencoder(3), torch.zeros(4, 2, 8))
    assert looked_at == [2]
    assert torch.equal(same(numbers), torch.eye(4, dtype=torch.bool)[..., None].expand(-1, -1, 2))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.3])
def test_the_batch_sampler_chooses_what_it_chooses_among_decoded_patches(temperature: float) -> None:
    """The patches and the draws of the algorithm on decoded patches, for the same random numbers."""
    model = Calm(CalmConfig(5, 2, 8, BackboneConfig(16, 24, 2, 2, 1), EnergyHeadConfig(1, 4)))
    model.initialise(torch.Generator().manual_seed(0))
    head = model.latent_head
    head.output[-1].weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))  # type: ignore[attr-defined]
    prompts = align_prompts([[1, 2, 3, 4], [4, 3, 2, 1]] * 20, 2, 0)
    decoder = autoencoder(2)
    step = next(calm_steps(model, decoder, prompts, Sampling(temperature, draws=30), torch.Generator().manual_seed(5)))
    hidden_states = model(model.inputs(prompts.token_ids.unflatten(-1, (-1, 2)), decoder))[:, -1]
    draws = torch.Generator().manual_seed(5)

    def draw(rows: Tensor, count: int) -> Tensor:
        return decoder.decode(head.sample(hidden_states[rows], head.sampling_draws((count, len(rows)), draws)))

    expected = batch_temperature(draw, 40, temperature, draws, draws=30)
    assert len(torch.unique(expected.symbols, dim=0)) > 3
    assert torch.equal(step.token_ids, expected.symbols)
    assert torch.equal(step.draws, expected.draws)
    assert torch.equal(step.reached, expected.reached)
    assert not step.exact and not step.finished.any()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with operators_of(request.param) as threads:
        yield threads


@torch.no_grad()
@pytest.mark.parametrize("config", [EnergyHeadConfig(1, 4), DiffusionHeadConfig(1, sampling_steps=2)])
def test_rows_in_parts_are_those_of_all_together(
    config: HeadConfig, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows, at most three at a time; one head's draws have a dimension more, before those of the samples."""
    head, model = config.build(16, 8), autoencoder(2)
    initialise(head, torch.Generator().manual_seed(0), embedding_std=1.0)
    hidden_states = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    draws = head.sampling_draws((40, 7), torch.Generator().manual_seed(2))
    real, working, together = equal_patches.equal_patches, set(), threading.Barrier(threads)

    def parted(model: Autoencoder, latents: Tensor) -> Tensor:
        if threading.get_ident() not in working:
            working.add(threading.get_ident())
            together.wait(timeout=30)  # passed by as many threads as there should be
        assert latents.shape[1] in (2, 3)
        return real(model, latents)

    monkeypatch.setattr(equal_patches, "CANDIDATES_AT_ONCE", 3 * 40)
    monkeypatch.setattr(equal_patches, "equal_patches", parted)
    found = equal_patches.candidates(head, model, hidden_states, draws)
    latents = head.sample(hidden_states, draws)
    assert (found.latents - latents).norm() < 1e-4 * latents.norm()
    patches = model.decode(found.latents)
    assert torch.equal(same(found.patches), (patches[:, None] == patches[None]).all(dim=-1))
    assert len(working) == threads
