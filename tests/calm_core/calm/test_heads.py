"""Three heads, one interface: what holds for each of them, alone and inside a CALM."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.denoiser import DenoisingDraws
from calm_core.calm.diffusion import cosine_schedule, diffuse_back, respaced
from calm_core.calm.diffusion_head import DiffusionHead, DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHead, EnergyHeadConfig
from calm_core.calm.flow_head import FlowHead, FlowHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.evaluation.continuations import calm_continuations
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.draws import GeneratorDraws
from calm_core.nn.layers import initialise
from calm_core.storage.model_folder import load_model, save_model

HIDDEN, LATENT = 16, 2
OBJECTIVE = HeadObjective(samples=4, target_samples=4)
BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
HEADS = [
    EnergyHeadConfig(2, 8),
    DiffusionHeadConfig(2, sampling_steps=20),
    FlowHeadConfig(2, "midpoint", 5),
    FlowHeadConfig(2, "euler", 20),
]

every_head = pytest.mark.parametrize("config", HEADS, ids=lambda config: "-".join(map(str, vars(config).values())))
every_input = pytest.mark.parametrize("inputs", ["tokens", "latents"])
Input = Literal["tokens", "latents"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(config: AnyHeadConfig) -> nn.Module:
    """A head with weights that all matter."""
    head = config.build(HIDDEN, LATENT)
    initialise(head, seeded(0), embedding_std=1.0)
    return head


def test_a_diffusion_head_samples_as_its_config_says() -> None:
    head = built(DiffusionHeadConfig(1, training_steps=30, sampling_steps=4, start_is_noise=True))
    assert isinstance(head, DiffusionHead)
    draws, hidden_states = head.sampling_draws((3,), seeded(2)), torch.randn(3, HIDDEN, generator=seeded(3))
    assert draws.shape == (4 + 1, 3, LATENT)
    condition = head.denoiser.condition(hidden_states)

    def network(points: Tensor, times: Tensor) -> Tensor:
        output: Tensor = head.denoiser(points, times, condition)
        return output

    expected = diffuse_back(network, respaced(cosine_schedule(30), 4), draws, start_is_noise=True)
    torch.testing.assert_close(head.sample(hidden_states, draws), expected)


def posterior_of(positions: int) -> Posterior:
    generator = seeded(1)
    return Posterior(
        torch.randn(positions, LATENT, generator=generator), torch.randn(positions, LATENT, generator=generator) - 1
    )


@every_head
def test_samples_have_the_shape_asked_for(config: AnyHeadConfig) -> None:
    head, generator = built(config), seeded(2)
    for hidden_shape, shape in [((), ()), ((3,), (3,)), ((3,), (5, 3)), ((2, 3), (5, 2, 3)), ((1, 3), (2, 3))]:
        hidden_states = torch.randn(*hidden_shape, HIDDEN, generator=generator)
        draws = head.sampling_draws(shape, generator)
        samples = head.sample(hidden_states, draws)
        assert samples.shape == (*shape, LATENT)
        spread = head.sample(hidden_states.expand(*shape, HIDDEN), draws)
        torch.testing.assert_close(samples, spread, rtol=1e-4, atol=1e-5)


@every_head
def test_randomness_comes_from_the_draws_alone(config: AnyHeadConfig) -> None:
    head = built(config)
    hidden_states = torch.randn(3, HIDDEN, generator=seeded(3))
    draws = head.sampling_draws((4, 3), seeded(4))
    assert torch.equal(draws, head.sampling_draws((4, 3), seeded(4)))
    assert torch.equal(head.sample(hidden_states, draws), head.sample(hidden_states, draws))
    assert not torch.equal(head.sample(hidden_states, draws)[0], head.sample(hidden_states, draws)[1])
    training_draws = head.training_draws(3, OBJECTIVE, GeneratorDraws(seeded(5)))
    again = head.training_draws(3, OBJECTIVE, GeneratorDraws(seeded(5)))
    assert all(torch.equal(a, b) for a, b in zip(training_draws, again, strict=True))
    losses = [head.loss(hidden_states, posterior_of(3), draws, OBJECTIVE).total for draws in (training_draws, again)]
    assert torch.equal(*losses)


@every_head
def test_a_fresh_head_does_not_look_at_hidden_states(config: AnyHeadConfig) -> None:
    head = built(config)
    head.zero_output()
    draws = head.sampling_draws((4, 3), seeded(4))
    first, second = (head.sample(torch.randn(3, HIDDEN, generator=seeded(seed)), draws) for seed in (5, 6))
    assert torch.equal(first, second)
    training_draws = head.training_draws(3, OBJECTIVE, GeneratorDraws(seeded(7)))
    loss = head.loss(torch.randn(3, HIDDEN, generator=seeded(5)), posterior_of(3), training_draws, OBJECTIVE)
    if isinstance(head, EnergyHead):
        assert torch.equal(first, torch.zeros(4, 3, LATENT))
    elif isinstance(head, FlowHead):
        assert torch.equal(first, draws)
        assert isinstance(training_draws, DenoisingDraws)
        data = posterior_of(3).sample(training_draws.targets)
        torch.testing.assert_close(loss.total, (data - training_draws.noise).square().mean())
    else:
        assert isinstance(training_draws, DenoisingDraws)
        torch.testing.assert_close(loss.terms["noise_error"], training_draws.noise.square().mean())


def test_training_draws_are_uniform_in_time() -> None:
    objective = HeadObjective(samples=8)
    for head, largest in ((DiffusionHead(DiffusionHeadConfig(1), 4, 2), 1000), (FlowHead(FlowHeadConfig(1), 4, 2), 1)):
        times = head.training_draws(4000, objective, GeneratorDraws(seeded(8))).times.double() / largest
        assert 0 <= times.min() < 0.001
        assert 0.999 <= times.max() < 1
        assert times.mean().item() == pytest.approx(0.5, abs=5 / (12 * times.numel()) ** 0.5)


@every_head
def test_bfloat16_keeps_samples_and_losses_in_float32(config: AnyHeadConfig) -> None:
    head = built(config)
    hidden_states = torch.randn(6, HIDDEN, generator=seeded(3))
    draws, training_draws = (
        head.sampling_draws((4, 6), seeded(4)),
        head.training_draws(6, OBJECTIVE, GeneratorDraws(seeded(5))),
    )
    exact = head.sample(hidden_states, draws)
    norms: list[torch.dtype] = []
    for module in head.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, arguments: norms.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = head.sample(hidden_states, draws)
        loss = head.loss(hidden_states.bfloat16(), posterior_of(6), training_draws, OBJECTIVE)
    assert {samples.dtype, loss.total.dtype, *(term.dtype for term in loss.terms.values())} == {torch.float32}
    assert set(norms) == {torch.float32}
    assert not torch.equal(samples, exact)
    torch.testing.assert_close(samples, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    assert not any(term.requires_grad for term in loss.terms.values())


@every_head
def test_gradients_reach_every_parameter(config: AnyHeadConfig) -> None:
    head = built(config)
    head.zero_output()
    optimiser = torch.optim.Adam(head.parameters(), 1e-3)
    hidden_states = torch.randn(6, HIDDEN, generator=seeded(3)).requires_grad_()
    for step in range(4):
        draws = head.training_draws(6, OBJECTIVE, GeneratorDraws(seeded(step)))
        head.zero_grad()
        hidden_states.grad = None
        head.loss(hidden_states, posterior_of(6), draws, OBJECTIVE).total.backward()
        optimiser.step()
    for name, weight in head.named_parameters():
        # Every row of a matrix, every entry of a vector.
        assert weight.grad is not None, name
        assert weight.grad.reshape(len(weight), -1).any(dim=1).all(), name
    assert hidden_states.grad is not None
    assert hidden_states.grad.any()


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of points [n, size], 0 for equal distributions."""
    within = sum(torch.cdist(points, points).sum() / (len(points) * (len(points) - 1)) for points in (first, second))
    return float(2 * torch.cdist(first, second).mean() - within)


MODES = torch.tensor([[[-1.0, -1.0], [1.0, 1.0]], [[-1.0, 1.0], [0.5, -0.5]]])
"""Two conditions, two modes each; all that tells the conditions apart is where the modes are."""


# The last time step keeps so little of the data that a step back over many at once would multiply every error of
# the noise by hundreds; a network as small as this has to take them all.
LEARNERS = [EnergyHeadConfig(2, 8), DiffusionHeadConfig(2, 50, 50), FlowHeadConfig(2, "midpoint", 5)]


def two_modes(condition: Tensor, generator: torch.Generator) -> Posterior:
    """A posterior a position, narrow, about one of its condition's modes."""
    mode = torch.randint(2, condition.shape, generator=generator)
    return Posterior(MODES[condition, mode], torch.full((len(condition), LATENT), -2.0))


@pytest.mark.parametrize("config", LEARNERS, ids=lambda config: config.kind)
def test_head_learns_a_conditional_distribution(config: AnyHeadConfig) -> None:
    head = built(config)
    head.zero_output()
    of_condition = torch.randn(2, HIDDEN, generator=seeded(3))
    truths = []
    for condition in torch.tensor([[0], [1]]):
        noise = torch.randn(1000, LATENT, generator=seeded(5))
        truths.append(two_modes(condition.expand(1000), seeded(4)).sample(noise))

    @torch.no_grad()
    def distances() -> Tensor:
        """Rows are conditions that samples are drawn under, columns those whose truth they are held against."""
        draws = head.sampling_draws((1000,), seeded(6))
        return torch.tensor(
            [[energy_distance(head.sample(hidden, draws), truth) for truth in truths] for hidden in of_condition]
        )

    start, steps, positions = distances(), 300, 256
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for step in range(steps):
        generator = seeded(100 + step)
        condition = torch.randint(2, (positions,), generator=generator)
        posterior = two_modes(condition, generator)
        draws = head.training_draws(positions, OBJECTIVE, GeneratorDraws(generator))
        optimiser.zero_grad()
        head.loss(of_condition[condition], posterior, draws, OBJECTIVE).total.backward()
        optimiser.step()
        schedule.step()
    end, between = distances(), energy_distance(*truths)
    assert torch.all(end.diagonal() < 0.1 * start.diagonal())
    assert torch.all(end.diagonal() < 0.03 * between)
    assert torch.all(end.fliplr().diagonal() > 0.8 * between)


def tiny(config: AnyHeadConfig, inputs: Input, patch_size: int) -> tuple[Calm, Autoencoder]:
    calm = Calm(CalmConfig(11, patch_size, 12, BACKBONE, config, inputs))
    autoencoder = Autoencoder(AutoencoderConfig(11, patch_size, 16, 24, 12))
    calm.initialise(seeded(0))
    autoencoder.initialise(seeded(1))
    return calm, autoencoder.requires_grad_(False)


@every_input
@every_head
def test_calm_trains(config: AnyHeadConfig, inputs: Input) -> None:
    calm, autoencoder = tiny(config, inputs, 2)
    patches = torch.randint(11, (4, 9, 2), generator=seeded(2))
    posterior = Posterior(*(part.flatten(0, 1) for part in autoencoder.encode(patches[:, 1:])))
    draws = calm.head.training_draws(32, OBJECTIVE, GeneratorDraws(seeded(3)))
    optimiser = torch.optim.Adam(calm.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        hidden_states = calm(calm.inputs(patches[:, :-1], autoencoder)).flatten(0, 1)
        loss = calm.head.loss(hidden_states, posterior, draws, OBJECTIVE).total
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    missed = [name for name, weight in calm.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert missed == []


@every_head
def test_continuations_feed_back_the_latents_that_were_sampled(
    config: AnyHeadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, autoencoder = tiny(config, "latents", 2)
    patches = torch.randint(11, (3, 5, 2), generator=seeded(2))
    given: list[Tensor] = []
    sampled: list[Tensor] = []
    calm.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    sample = calm.head.sample

    def recorded(hidden_states: Tensor, draws: Tensor) -> Tensor:
        sampled.append(sample(hidden_states, draws))
        return sampled[-1]

    monkeypatch.setattr(calm.head, "sample", recorded)
    drawn = calm_continuations(calm, autoencoder, patches, 4, 2, seeded(3))
    assert drawn.shape == (2, 3, 5, 4)
    assert len(given) == len(sampled) == 2
    assert torch.equal(given[0], autoencoder.encode(patches).mean)
    assert torch.equal(given[1], sampled[0])
    decoded = [autoencoder.decode(latents).unflatten(0, (2, 3)) for latents in sampled]
    assert torch.equal(drawn, torch.cat(decoded, dim=-1))


@every_input
@every_head
def test_model_survives_its_folder(config: AnyHeadConfig, inputs: Input, tmp_path: Path) -> None:
    calm, _ = tiny(config, inputs, 3)
    initialise(calm, seeded(4), embedding_std=1.0)
    save_model(calm, None, tmp_path, 12)
    loaded = load_model(Calm, tmp_path)
    assert loaded.config == calm.config
    assert type(loaded.head) is type(calm.head)
    shape = (1, 4, 3) if inputs == "tokens" else (1, 4, 12)
    given = torch.randint(11, shape, generator=seeded(5))
    given = given if inputs == "tokens" else given.float()
    draws = calm.head.sampling_draws((1, 4), seeded(6))
    with torch.no_grad():
        samples = [model.head.sample(model(given), draws) for model in (calm, loaded)]
    assert torch.equal(*samples)
