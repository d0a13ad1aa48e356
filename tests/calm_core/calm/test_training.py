"""What a CALM learns: the patch that follows, under its head's loss; both written out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, CalmConfig
from calm_core.calm.training import CalmObjective, SequenceBatch, calm_config, manifold_distance, train_calm
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.training.loop import train
from tests.calm_core.training.tiny_trainings import (
    CONTEXT,
    LATENT,
    calm_section,
    encoded,
    random_tokens,
    seeded,
    stream_of,
    tiny_autoencoder,
)

INPUTS = ["tokens", "latents"]
HEADS = ["energy", "diffusion", "flow"]


def objective_of(
    params: Params,
    folder: Path,
    token_ids: Tensor,
    autoencoder: Autoencoder,
    *,
    seed: int = 0,
    trained: bool = False,
    **changes: Any,
) -> CalmObjective:
    """With weights that all matter if ``trained``, else with fresh ones."""
    tokens = stream_of(folder, token_ids)
    latents = encoded(folder, tokens, autoencoder)
    objective = CalmObjective(calm_section(params, **changes), tokens, latents, autoencoder, seed)
    if trained:
        initialise(objective.model, seeded(2), embedding_std=1.0)
    return objective


def flat(batch: Any) -> list[Tensor]:
    return [batch] if isinstance(batch, Tensor) else [tensor for part in batch for tensor in flat(part)]


def blocks_of(token_ids: Tensor) -> dict[tuple[int, ...], int]:
    """Where each block of a context's length begins, by its tokens."""
    starts = range(0, len(token_ids) - CONTEXT + 1, CONTEXT)
    blocks = {tuple(token_ids[start : start + CONTEXT].tolist()): start for start in starts}
    assert len(blocks) == len(starts)
    return blocks


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_target_of_a_patch_is_the_patch_after_it(patch_size: int, params: Params, tmp_path: Path) -> None:
    token_ids, autoencoder = random_tokens(8 * CONTEXT + 3), tiny_autoencoder(patch_size)
    objective = objective_of(params, tmp_path, token_ids, autoencoder)
    blocks = blocks_of(token_ids)
    for step in range(3):
        batch = objective.batch(step, range(4))
        assert batch.inputs.shape == (4, CONTEXT // patch_size, patch_size)
        starts = [blocks[tuple(row)] for row in batch.inputs.flatten(1).tolist()]
        following = [token_ids[start + patch_size : start + patch_size + CONTEXT] for start in starts]
        expected = autoencoder.encode(torch.cat(following).view(-1, patch_size))
        torch.testing.assert_close(batch.posterior.mean, expected.mean, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(batch.posterior.log_std, expected.log_std, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_latents_as_inputs_are_those_of_the_patches_themselves(patch_size: int, params: Params, tmp_path: Path) -> None:
    # Posteriors without spread, so that a sample is its mean.
    autoencoder = tiny_autoencoder(patch_size)
    autoencoder.encoder.to_posterior.weight[LATENT:] = 0
    autoencoder.encoder.to_posterior.bias[LATENT:] = -20
    token_ids = random_tokens(8 * CONTEXT + patch_size)
    objective = objective_of(params, tmp_path, token_ids, autoencoder, input="latents")
    patches = token_ids[: 8 * CONTEXT].view(8, -1, patch_size)
    blocks = autoencoder.encode(patches).mean
    seen = []
    for step in range(2):
        batch = objective.batch(step, range(4))
        for row, posterior in zip(batch.inputs, batch.posterior.mean.unflatten(0, (4, -1)), strict=True):
            distances = (blocks - row).abs().amax(dim=(1, 2))
            block = int(distances.argmin())
            assert distances[block] < 2e-3
            start = block * CONTEXT + patch_size
            expected = autoencoder.encode(token_ids[start : start + CONTEXT].view(-1, patch_size)).mean
            torch.testing.assert_close(posterior, expected, atol=2e-3, rtol=1e-3)
            seen.append(block)
    assert sorted(seen) == list(range(8))


def test_latents_as_inputs_are_sampled_from_their_posterior(params: Params, tmp_path: Path) -> None:
    autoencoder, token_ids = tiny_autoencoder(1), random_tokens(9 * CONTEXT)
    changes = {"input": "latents", "batch_sequences": 8}
    objective = objective_of(params, tmp_path, token_ids, autoencoder, **changes)
    by_tokens = objective_of(params, tmp_path, token_ids, autoencoder, batch_sequences=8)
    posterior = autoencoder.encode(by_tokens.batch(0, range(8)).inputs)
    noise = (objective.batch(0, range(8)).inputs - posterior.mean) / posterior.log_std.exp()
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.001
    assert scipy.stats.pearsonr(noise[:4].flatten().numpy(), noise[4:].flatten().numpy()).pvalue > 0.001


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("head", HEADS)
def test_rows_are_the_same_however_a_batch_is_divided(head: str, inputs: str, params: Params, tmp_path: Path) -> None:
    objective = objective_of(params, tmp_path, random_tokens(90), tiny_autoencoder(2), head=head, input=inputs)
    whole = objective.batch(5, range(4))
    positions = CONTEXT // 2
    for rows in (range(0, 2), range(2, 4), range(3, 4)):
        places = slice(rows.start * positions, rows.stop * positions)
        part = objective.batch(5, rows)
        assert torch.equal(part.inputs, whole.inputs[rows.start : rows.stop])
        for name in ("mean", "log_std"):
            assert torch.equal(getattr(part.posterior, name), getattr(whole.posterior, name)[places])
        for name, draws in part.draws._asdict().items():
            of_whole = getattr(whole.draws, name)
            shared = head == "energy" and name == "targets"
            assert torch.equal(draws, of_whole if shared else of_whole[:, places]), name
    assert all(torch.equal(a, b) for a, b in zip(flat(objective.batch(5, range(4))), flat(whole), strict=True))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("head", HEADS)
def test_steps_rows_and_seeds_draw_anew(head: str, inputs: str, params: Params, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"head": head, "input": inputs}
    objective, other = (
        objective_of(params, tmp_path, random_tokens(90), tiny_autoencoder(2), seed=seed, **changes) for seed in (0, 1)
    )
    batch = objective.batch(0, range(4))
    for different in (objective.batch(1, range(4)), other.batch(0, range(4))):
        assert not any(torch.equal(a, b) for a, b in zip(flat(batch), flat(different), strict=True))
    # Random numbers of one row are those of no other.
    for name, draws in batch.draws._asdict().items():
        if not (head == "energy" and name == "targets"):
            first, *others = draws.unflatten(1, (4, -1)).unbind(1)
            assert not any((first == row).double().mean() > 0.1 for row in others), name


def test_an_epoch_takes_each_sequence_once(params: Params, tmp_path: Path) -> None:
    """The last sequence ends one patch before the split does; one patch less, and there is a sequence less."""
    token_ids = random_tokens(7 * CONTEXT + 2)
    blocks = blocks_of(token_ids)
    for count, expected in ((len(token_ids), 7), (len(token_ids) - 1, 6)):
        folder = tmp_path / str(count)
        folder.mkdir()
        objective = objective_of(params, folder, token_ids[:count], tiny_autoencoder(2), batch_sequences=3)
        rows = torch.cat([objective.batch(step, range(3)).inputs for step in range(2 * expected)]).flatten(1)
        seen = [blocks[tuple(row)] // CONTEXT for row in rows.tolist()]
        for epoch in range(6):
            assert sorted(seen[epoch * expected : (epoch + 1) * expected]) == list(range(expected))


def test_a_message_names_the_text_of_its_step(params: Params, tmp_path: Path) -> None:
    token_ids = random_tokens(90)
    objective = objective_of(params, tmp_path, token_ids, tiny_autoencoder(2))
    blocks = blocks_of(token_ids)
    starts = [blocks[tuple(row)] for row in objective.batch(3, range(4)).inputs.flatten(1).tolist()]
    assert objective.describe_batch(3) == f"sequences from tokens {', '.join(map(str, starts))} of the training split"


def test_a_split_of_less_than_a_sequence_is_refused(params: Params, tmp_path: Path) -> None:
    with pytest.raises(CalmError, match=r"8 tokens, fewer than calm.context_tokens 8 and a patch"):
        objective_of(params, tmp_path, random_tokens(CONTEXT), tiny_autoencoder(2))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("energy", EnergyHeadConfig(3, 5)),
        ("diffusion", DiffusionHeadConfig(3, 1000, 7, start_is_noise=True)),
        ("flow", FlowHeadConfig(3, "euler", 9)),
    ],
)
def test_the_shape_that_params_ask_for(head: str, expected: AnyHeadConfig, params: Params) -> None:
    sizes = {"noise_size": 5, "diffusion_steps": 7, "flow_solver": "euler", "flow_steps": 9}
    section = calm_section(params, head=head, head_blocks=3, input="latents", **sizes)
    found = calm_config(section, AutoencoderConfig(50, 2, 12, 16, 6))
    assert found == CalmConfig(50, 2, 6, BackboneConfig(16, 24, 1, 2, 1), expected, "latents")


def test_a_split_of_one_sequence_is_enough(params: Params, tmp_path: Path) -> None:
    token_ids = random_tokens(CONTEXT + 2)
    objective = objective_of(params, tmp_path, token_ids, tiny_autoencoder(2))
    assert torch.equal(objective.batch(0, range(1)).inputs.flatten(), token_ids[:CONTEXT])


def energy_by_hand(samples: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Fidelity and diversity of samples [N, size] against targets [M, size] in one place."""
    count = len(samples)
    fidelity = 2 * torch.stack([(x - y).norm() ** alpha for x in samples for y in targets]).mean()
    pairs = [(samples[n] - samples[k]).norm() ** alpha for n in range(count) for k in range(count) if n != k]
    return fidelity, torch.stack(pairs).mean()


@pytest.mark.parametrize("decoder_score", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_energy_loss_by_hand(alpha: float, decoder_score: bool, params: Params, tmp_path: Path) -> None:
    autoencoder = tiny_autoencoder(2)
    changes = {"alpha": alpha, "decoder_score": decoder_score, "samples": 3, "target_samples": 4}
    objective = objective_of(params, tmp_path, random_tokens(90), autoencoder, trained=True, **changes)
    batch = objective.batch(0, range(2))
    assert isinstance(batch, SequenceBatch)
    assert [tuple(draws.shape) for draws in batch.draws] == [(3, 8, 5), (2, LATENT), (int(decoder_score), 8, LATENT)]
    loss = objective.loss(batch)

    hidden_states = objective.model(batch.inputs).flatten(0, 1)
    samples = objective.model.head.sample(hidden_states, batch.draws.noise).detach().double()
    mean, std = batch.posterior.mean.double(), batch.posterior.log_std.double().exp()
    noise = torch.cat([batch.draws.targets, -batch.draws.targets]).double()
    parts = []
    for place in range(8):
        targets = mean[place] + std[place] * noise
        fidelity, diversity = energy_by_hand(samples[:, place], targets, alpha)
        if alpha == 1:
            scores = [
                scoringrules.es_ensemble(y, samples[:, place].numpy(), estimator="fair", backend="numpy")
                for y in targets.numpy()
            ]
            assert float(fidelity - diversity) == pytest.approx(2 * np.mean(scores))
        if decoder_score:
            target = autoencoder.hidden_states((mean + std * batch.draws.scored_targets[0])[place].float())
            images = autoencoder.hidden_states(samples[:, place].float())
            images, target = images.double(), target.double()
            tokens = [energy_by_hand(images[:, token], target[None, token], alpha) for token in range(2)]
            fidelity = fidelity + torch.stack([values[0] for values in tokens]).mean()
            diversity = diversity + torch.stack([values[1] for values in tokens]).mean()
        parts.append(torch.stack([fidelity - diversity, fidelity, diversity]))
    expected = torch.stack(parts).mean(dim=0).float()
    found = torch.stack([loss.total, loss.terms["fidelity"], loss.terms["diversity"]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(loss.terms) == {"fidelity", "diversity"}


def test_diffusion_loss_by_hand(params: Params, tmp_path: Path) -> None:
    changes = {"head": "diffusion", "samples": 3}
    objective = objective_of(params, tmp_path, random_tokens(90), tiny_autoencoder(2), trained=True, **changes)
    batch = objective.batch(0, range(2))
    t, noise = batch.draws.times, batch.draws.noise.double()
    assert t.shape == (3, 8)
    assert 1 <= t.min() < 200 < 800 < t.max() < 999  # inside the range of the closed forms below
    loss = objective.loss(batch)

    def share(t: Tensor) -> Tensor:
        return ((t.double() / 1000 + 0.008) / 1.008 * math.pi / 2).cos().square()[..., None] / share_at_start

    share_at_start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    now, before = share(t + 1), share(t)
    beta = 1 - now / before
    data = batch.posterior.mean + batch.posterior.log_std.exp() * batch.draws.targets.double()
    noisy = now.sqrt() * data + (1 - now).sqrt() * noise
    denoiser = objective.model.head.denoiser
    condition = denoiser.condition(objective.model(batch.inputs).flatten(0, 1))
    predicted, fraction = denoiser(noisy.float(), t, condition).detach().double().chunk(2, dim=-1)
    least = beta * (1 - before) / (1 - now)
    truth_mean = (before.sqrt() * beta * data + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - now)
    model_mean = (noisy - beta / (1 - now).sqrt() * predicted) / (1 - beta).sqrt()
    log_variance = (1 + fraction) / 2 * beta.log() + (1 - fraction) / 2 * least.log()
    bits = torch.distributions.kl_divergence(
        torch.distributions.Normal(truth_mean, least.sqrt()),
        torch.distributions.Normal(model_mean, (log_variance / 2).exp()),
    ) / math.log(2)
    expected = [(noise - predicted).square().mean().float(), bits.mean().float()]
    torch.testing.assert_close(
        [loss.terms["noise_error"], loss.terms["variational_bound"]], expected, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(loss.total, sum(expected), rtol=1e-3, atol=0)
    assert set(loss.terms) == {"noise_error", "variational_bound"}


def test_flow_loss_by_hand(params: Params, tmp_path: Path) -> None:
    changes = {"head": "flow", "samples": 3}
    objective = objective_of(params, tmp_path, random_tokens(90), tiny_autoencoder(2), trained=True, **changes)
    batch = objective.batch(0, range(2))
    t, noise = batch.draws.times, batch.draws.noise
    assert t.shape == (3, 8)
    loss = objective.loss(batch)
    data = batch.posterior.mean + batch.posterior.log_std.exp() * batch.draws.targets
    points = noise + t[..., None] * (data - noise)
    denoiser = objective.model.head.denoiser
    condition = denoiser.condition(objective.model(batch.inputs).flatten(0, 1))
    velocity = denoiser(points, (1000 * t).floor().long(), condition)
    torch.testing.assert_close(loss.total, (velocity - data + noise).square().mean())
    assert loss.terms == {"velocity_error": loss.total.detach()}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_weight_and_terms_carry_none(
    head: str, inputs: str, params: Params, tmp_path: Path
) -> None:
    autoencoder = tiny_autoencoder(2)
    changes: dict[str, Any] = {"head": head, "input": inputs}
    objective = objective_of(params, tmp_path, random_tokens(90), autoencoder, trained=True, **changes)
    loss = objective.loss(objective.batch(0, range(4)))
    loss.total.backward()
    missed = [
        name for name, weight in objective.model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert missed == []
    assert loss.features is not None
    assert not any(tensor.requires_grad for tensor in (loss.features, *loss.terms.values()))


def test_its_own_section_trains_it_and_not_the_autoencoder(params: Params, tmp_path: Path) -> None:
    autoencoder, tokens = tiny_autoencoder(2), stream_of(tmp_path, random_tokens(90))
    latents = encoded(tmp_path, tokens, autoencoder)
    before = {name: weight.clone() for name, weight in autoencoder.state_dict().items()}
    section = calm_section(params, steps=3, warmup_steps=0, weight_decay=0.1, decoder_score=True)
    seeded_params = params.model_copy(update={"calm": section, "seed": 3})
    calm = train_calm(seeded_params, tokens, latents, autoencoder)
    assert all(torch.equal(weight, before[name]) for name, weight in autoencoder.state_dict().items())
    assert not {id(weight) for weight in calm.parameters()} & {id(weight) for weight in autoencoder.parameters()}
    fresh = CalmObjective(section, tokens, latents, autoencoder, 3).model
    moved = [name for name, weight in calm.named_parameters() if not torch.equal(weight, fresh.get_parameter(name))]
    # Of a head that starts at zero the first steps move the whole.
    assert moved == [name for name, _ in calm.named_parameters()]
    expected = train(CalmObjective(section, tokens, latents, autoencoder, 3), section, params.runtime)
    for name, weight in expected.named_parameters():
        assert torch.equal(calm.get_parameter(name), weight), name


def test_samples_after_the_first_positions_are_observed(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.calm.training.OBSERVED_POSITIONS", 5)
    autoencoder = tiny_autoencoder(2)
    objective = objective_of(params, tmp_path, random_tokens(90), autoencoder, seed=4, trained=True)
    batch = objective.batch(0, range(4))
    with torch.no_grad():
        features = objective.loss(batch).features
        hidden_states = objective.model(batch.inputs).flatten(0, 1)[:5]
        torch.testing.assert_close(features, hidden_states)
        noise = torch.rand(5, 5, generator=generator(4, "train_calm", "observed")) - 0.5
        samples = objective.model.head.sample(hidden_states, noise)
        logits = F.linear(autoencoder.hidden_states(samples), autoencoder.encoder.embedding.weight)
        nearest = autoencoder.encode(logits.argmax(dim=-1)).mean
        distances = [math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / LATENT)
                     for x, y in zip(samples.tolist(), nearest.tolist(), strict=True)]  # fmt: skip
        assert objective.observe(features) == {"manifold_distance": pytest.approx(sum(distances) / 5, rel=1e-5)}


def test_latents_that_decode_to_their_own_patch_are_at_no_distance() -> None:
    autoencoder, patches = tiny_autoencoder(1), torch.arange(50)[:, None]
    codes = autoencoder.encode(patches).mean
    own = (autoencoder.decode(codes) == patches).squeeze(-1)
    assert 0 < own.sum() < 50
    distances = manifold_distance(autoencoder, codes)
    assert distances[own].max() < 1e-6
    assert distances[~own].min() > 1e-2
