"""Every patch size trains, the KL clip does what it says, and dropout keeps targets whole."""

import pytest
import torch

from calm_core.autoencoder.model import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderDraws,
    Posterior,
    autoencoder_loss,
    clipped_kl,
    draw,
)
from calm_core.nn.draws import GeneratorDraws


@pytest.mark.parametrize("patch_size", range(1, 9))
def test_it_learns_at_every_patch_size(patch_size: int) -> None:
    generator = torch.Generator().manual_seed(patch_size)
    patches = torch.randint(11, (72, patch_size), generator=generator)
    autoencoder = Autoencoder(AutoencoderConfig(11, patch_size, 16, 24, 12))
    autoencoder.initialise(generator)
    draws = draw(autoencoder.config, len(patches), GeneratorDraws(generator))
    optimiser = torch.optim.Adam(autoencoder.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = autoencoder_loss(autoencoder, patches, draws).total
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


def test_kl_is_that_of_normals_and_clipped_by_dimension() -> None:
    mean, log_std = torch.tensor([[0.7, 0.0, 3.0]]), torch.tensor([[-0.5, 0.0, -1.0]])
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(clipped_kl(Posterior(mean, log_std), 0.0), exact.sum(-1))
    torch.testing.assert_close(clipped_kl(Posterior(mean, log_std), 0.5), exact.clamp(min=0.5).sum(-1))
    of_sequences = Posterior(mean.expand(2, 4, 3), log_std.expand(2, 4, 3))
    torch.testing.assert_close(clipped_kl(of_sequences, 0.5), clipped_kl(Posterior(mean, log_std), 0.5).expand(2, 4))


def test_fresh_logits_have_unit_scale() -> None:
    model = Autoencoder(AutoencoderConfig(500, 2, 16, 24, 4))
    model.initialise(torch.Generator().manual_seed(0))
    assert model.encoder.embedding.weight.std().item() == pytest.approx(16**-0.5, rel=0.03)


def test_dropout_keeps_targets_and_the_latent_scale() -> None:
    model = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 4))
    model.initialise(torch.Generator().manual_seed(0))
    token_ids = torch.randint(1, 11, (5, 2))
    draws = draw(model.config, 5, GeneratorDraws(torch.Generator().manual_seed(1)))
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    latents: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: latents.append(arguments[0]))
    autoencoder_loss(model, token_ids, draws, token_dropout=0.5, latent_dropout=0.25)
    dropped = draws.token_uniform < 0.5
    assert torch.equal(seen[0], token_ids.masked_fill(dropped, 0))
    whole = model.encode(seen[0]).sample(draws.noise)
    torch.testing.assert_close(latents[0], torch.where(draws.latent_uniform < 0.25, 0, whole / 0.75))


def test_the_published_weights_and_dropout_are_the_defaults() -> None:
    model = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 4))
    model.initialise(torch.Generator().manual_seed(0))
    token_ids = torch.randint(11, (200, 2), generator=torch.Generator().manual_seed(1))
    draws = draw(model.config, 200, GeneratorDraws(torch.Generator().manual_seed(2)))
    published = {"kl_weight": 0.001, "kl_clamp": 0.5, "token_dropout": 0.15, "latent_dropout": 0.15}
    assert autoencoder_loss(model, token_ids, draws) == autoencoder_loss(model, token_ids, draws, **published)


def test_dropout_of_nothing_drops_nothing() -> None:
    model = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 4))
    model.initialise(torch.Generator().manual_seed(0))
    token_ids = torch.randint(1, 11, (5, 2), generator=torch.Generator().manual_seed(1))
    noise, _, _ = draw(model.config, 5, GeneratorDraws(torch.Generator().manual_seed(2)))
    lowest, high = (
        autoencoder_loss(
            model,
            token_ids,
            AutoencoderDraws(noise, torch.full((5, 2), uniform), torch.full((5, 4), uniform)),
            token_dropout=0.0,
            latent_dropout=0.0,
        )
        for uniform in (0.0, 0.5)
    )
    assert lowest == high


def test_bfloat16_keeps_sums_norms_and_losses_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 12))
    autoencoder.initialise(generator)
    seen: list[torch.dtype] = []
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    token_ids = torch.randint(11, (12, 2), generator=generator)
    draws = draw(autoencoder.config, 12, GeneratorDraws(generator))
    exact = autoencoder_loss(autoencoder, token_ids, draws).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = autoencoder_loss(autoencoder, token_ids, draws).total
    assert set(seen) == {torch.float32}
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
