"""Every patch size trains, the KL clip does what it says, and models survive a trip through their folder."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior, autoencoder_loss, clipped_kl, draw
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import load_model, read_config, save_model
from calm_core.tokens.tokenizer import load_tokenizer, train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words, a few more"], 260)


@pytest.mark.parametrize("patch_size", range(1, 9))
def test_both_models_learn_at_every_patch_size(patch_size: int) -> None:
    generator = torch.Generator().manual_seed(patch_size)
    token_ids = torch.randint(11, (12, 6, patch_size), generator=generator)
    autoencoder = Autoencoder(AutoencoderConfig(11, patch_size, 16, 24, 12))
    autoencoder.initialise(generator)
    patches = token_ids.flatten(0, 1)
    draws = draw(autoencoder.config, len(patches), generator)
    optimiser = torch.optim.Adam(autoencoder.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = autoencoder_loss(autoencoder, patches, draws).total
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]

    autoencoder.requires_grad_(False)
    calm = Calm(CalmConfig(11, patch_size, 12, BACKBONE, EnergyHeadConfig(1, 8)))
    calm.initialise(generator)
    posterior = autoencoder.encode(token_ids[:, 1:].flatten(0, 1))
    optimiser = torch.optim.Adam(calm.parameters(), 1e-2)
    losses = []
    objective = HeadObjective(samples=4, target_samples=4, spaces=(autoencoder.hidden_states,))
    head_draws = calm.head.training_draws(len(posterior.mean), objective, generator)
    for _ in range(12):
        loss = calm.head.loss(calm(token_ids[:, :-1]).flatten(0, 1), posterior, head_draws, objective).total
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in calm.parameters())


def test_energy_head_starts_at_the_origin() -> None:
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    generator = torch.Generator().manual_seed(0)
    calm.initialise(generator)
    hidden_states = torch.randn(3, 16, generator=generator)
    samples = calm.head.sample(hidden_states, calm.head.sampling_draws((2, 3), generator))
    assert torch.equal(samples, torch.zeros(2, 3, 12))


def test_kl_is_that_of_normals_and_clipped_by_dimension() -> None:
    mean, log_std = torch.tensor([[0.7, 0.0, 3.0]]), torch.tensor([[-0.5, 0.0, -1.0]])
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(clipped_kl(Posterior(mean, log_std), 0.0), exact.sum(-1))
    torch.testing.assert_close(clipped_kl(Posterior(mean, log_std), 0.5), exact.clamp(min=0.5).sum(-1))


def test_dropout_keeps_targets_and_the_latent_scale() -> None:
    model = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 4))
    model.initialise(torch.Generator().manual_seed(0))
    token_ids = torch.randint(1, 11, (5, 2))
    draws = draw(model.config, 5, torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    latents: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: latents.append(arguments[0]))
    autoencoder_loss(model, token_ids, draws, token_dropout=0.5, latent_dropout=0.25)
    dropped = draws.token_uniform < 0.5
    assert torch.equal(seen[0], token_ids.masked_fill(dropped, 0))
    whole = model.encode(seen[0]).sample(draws.noise)
    torch.testing.assert_close(latents[0], torch.where(draws.latent_uniform < 0.25, 0, whole / 0.75))


def test_models_survive_their_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    calm.initialise(torch.Generator().manual_seed(0))
    save_model(calm, tokenizer, tmp_path, 64)
    assert read_config(tmp_path)["context_tokens"] == 64
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()
    loaded = load_model(Calm, tmp_path)
    assert loaded.config == calm.config
    for name, weight in calm.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    with pytest.raises(CalmError, match="no model of kind 'transformer'"):
        load_model(Transformer, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CalmError, match="damaged"):
        load_model(Calm, tmp_path)


def test_next_token_loss_is_uniform_for_an_ignorant_model() -> None:
    model = Transformer(TransformerConfig(11, BACKBONE))
    model.initialise(torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model.output.weight)
    loss = next_token_loss(model, torch.randint(11, (2, 7)))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


def test_bfloat16_keeps_sums_norms_and_losses_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(11, 2, 16, 24, 12))
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    transformer = Transformer(TransformerConfig(11, BACKBONE))
    seen: list[torch.dtype] = []
    for model in (autoencoder, calm, transformer):
        model.initialise(generator)
        for module in model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    token_ids = torch.randint(11, (3, 4, 2), generator=generator)
    objective = HeadObjective(spaces=(autoencoder.hidden_states,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draws = draw(autoencoder.config, 12, generator)
        coder_loss = autoencoder_loss(autoencoder, token_ids.flatten(0, 1), draws).total
        hidden_states = calm(token_ids)
        head_draws = calm.head.training_draws(12, objective, generator)
        posterior = Posterior(*torch.zeros(2, 12, 12))
        loss = calm.head.loss(hidden_states.flatten(0, 1), posterior, head_draws, objective).total
        token_loss = next_token_loss(transformer, token_ids.flatten(1))
    assert set(seen) == {torch.float32}
    assert {coder_loss.dtype, loss.dtype, token_loss.dtype} == {torch.float32}
    (coder_loss + loss + token_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in calm.parameters() if p.grad is not None)
