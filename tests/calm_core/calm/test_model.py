"""A CALM as a whole: every patch size trains, samples start at the origin, bfloat16 is kept to products."""

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm, CalmConfig
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.draws import GeneratorDraws

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)


@pytest.mark.parametrize("patch_size", range(1, 9))
def test_it_learns_at_every_patch_size(patch_size: int) -> None:
    generator = torch.Generator().manual_seed(patch_size)
    token_ids = torch.randint(11, (12, 6, patch_size), generator=generator)
    autoencoder = Autoencoder(AutoencoderConfig(11, patch_size, 16, 24, 12))
    autoencoder.initialise(generator)
    autoencoder.requires_grad_(False)
    calm = Calm(CalmConfig(11, patch_size, 12, BACKBONE, EnergyHeadConfig(1, 8)))
    calm.initialise(generator)
    posterior = autoencoder.encode(token_ids[:, 1:].flatten(0, 1))
    optimiser = torch.optim.Adam(calm.parameters(), 1e-2)
    losses = []
    objective = HeadObjective(samples=4, target_samples=4, spaces=(autoencoder.hidden_states,))
    draws = calm.head.training_draws(len(posterior.mean), objective, GeneratorDraws(generator))
    for _ in range(12):
        loss = calm.head.loss(calm(token_ids[:, :-1]).flatten(0, 1), posterior, draws, objective).total
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad is not None for parameter in calm.parameters())


def test_energy_head_starts_at_the_origin() -> None:
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    generator = torch.Generator().manual_seed(0)
    calm.initialise(generator)
    hidden_states = torch.randn(3, 16, generator=generator)
    samples = calm.head.sample(hidden_states, calm.head.sampling_draws((2, 3), generator))
    assert torch.equal(samples, torch.zeros(2, 3, 12))


def test_fresh_embeddings_have_unit_scale_and_layers_add_nothing() -> None:
    calm = Calm(CalmConfig(500, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    calm.initialise(torch.Generator().manual_seed(0))
    embedding = calm.patch_embedding.embedding
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    patches = torch.randint(500, (2, 7, 2), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(calm(patches), calm.backbone.norm(calm.patch_embedding(patches)))


def test_bfloat16_keeps_sums_norms_and_losses_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 12))
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    seen: list[torch.dtype] = []
    for model in (autoencoder, calm):
        model.initialise(generator)
        for module in model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    token_ids = torch.randint(11, (3, 4, 2), generator=generator)
    objective = HeadObjective(spaces=(autoencoder.hidden_states,))
    draws = calm.head.training_draws(12, objective, GeneratorDraws(generator))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = Posterior(*torch.zeros(2, 12, 12))
        loss = calm.head.loss(calm(token_ids).flatten(0, 1), posterior, draws, objective).total
    assert set(seen) == {torch.float32}
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in calm.parameters() if p.grad is not None)
