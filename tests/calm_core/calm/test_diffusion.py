"""The diffusion process against the mathematics of Gaussians: nothing here is recorded."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from calm_core.calm.diffusion import Network, Schedule, cosine_schedule, diffuse_back, diffusion_loss, respaced

STEPS = 1000


def retained(time_steps: list[int]) -> np.ndarray:
    """a_t of the cosine schedule in closed form; the last step's beta is capped."""
    times = (np.array(time_steps) + 1) / STEPS
    shares = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    if time_steps[-1] == STEPS - 1:
        shares[-1] = 0.001 * retained([STEPS - 2])[0]
    return shares


def bayes(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_(t-1) given x_0 and x_t, at every step but the first: weights of x_0 and of x_t in its mean, variance.

    The product of two normal densities in x_(t-1): N(sqrt(a_(t-1)) x_0, 1 - a_(t-1)) and the likelihood of x_t.
    """
    now = retained(schedule.time_steps)
    before, kept = now[:-1], now[1:] / now[:-1]
    variance = 1 / (1 / (1 - before) + kept / (1 - kept))
    return variance * np.sqrt(before) / (1 - before), variance * np.sqrt(kept) / (1 - kept), variance


def single(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


def test_cosine_schedule_in_closed_form() -> None:
    schedule = cosine_schedule(STEPS)
    assert len(schedule) == STEPS
    expected = retained(list(range(STEPS)))
    assert np.all(np.diff(expected) < 0)
    assert torch.all(schedule.signal.diff() < 0)
    torch.testing.assert_close(schedule.signal, single(np.sqrt(expected)), rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.noise, single(np.sqrt(1 - expected)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [STEPS, 100, 7, 2])
def test_step_back_is_bayes_rule(steps: int) -> None:
    schedule = respaced(cosine_schedule(STEPS), steps)
    of_data, of_noisy, variance = bayes(schedule)
    torch.testing.assert_close(schedule.posterior_mean[0][1:], single(of_data), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(schedule.posterior_mean[1][1:], single(of_noisy), rtol=1e-4, atol=1e-6)
    smallest, largest = schedule.log_variances
    torch.testing.assert_close(smallest[1:], single(np.log(variance)), rtol=1e-5, atol=1e-6)
    now = retained(schedule.time_steps)
    torch.testing.assert_close(largest, single(np.log(1 - now / np.append(1, now[:-1]))), rtol=1e-5, atol=1e-6)
    # The first step leads to x_0 itself, whose variance is zero; it borrows the second's.
    assert smallest[0] == smallest[1]
    assert [values[0].item() for values in schedule.posterior_mean] == pytest.approx([1, 0])


@pytest.mark.parametrize("steps", [2, 3, 7, 100, 999, STEPS])
def test_respacing_keeps_steps_and_what_they_retain(steps: int) -> None:
    whole = cosine_schedule(STEPS)
    schedule = respaced(whole, steps)
    kept = schedule.time_steps
    assert len(kept) == len(schedule) == steps
    assert kept[0] == 0
    assert kept[-1] == STEPS - 1
    gaps = np.diff(kept)
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() <= 1
    torch.testing.assert_close(schedule.signal, whole.signal[kept], rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.noise, whole.noise[kept], rtol=1e-6, atol=0)


def test_respacing_to_all_steps_changes_nothing() -> None:
    whole = cosine_schedule(STEPS)
    same = respaced(whole, STEPS)
    assert same.time_steps == whole.time_steps
    for name in ("inverse", "posterior_mean", "log_variances"):
        for values, expected in zip(getattr(same, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)


def fraction_of(schedule: Schedule, variances: Tensor) -> Tensor:
    """What a network says to take steps back of ``variances`` [steps]."""
    smallest, largest = schedule.log_variances
    return 2 * (variances.log() - smallest) / (largest - smallest) - 1


def gaussian_network(schedule: Schedule, mean: float, std: float) -> Network:
    """The optimal one for data N(mean, std^2): conditional mean of the noise, exact variance of every step back."""
    now = retained(schedule.time_steps)
    before = np.append(1, now[:-1])
    likelihood = now / before / (1 - now / before)
    variance = 1 / (1 / (before * std**2 + 1 - before) + likelihood)
    fractions = fraction_of(schedule, single(variance))
    shares = single(now)

    def network(points: Tensor, times: Tensor) -> Tensor:
        index = schedule.time_steps.index(int(times.flatten()[0]))
        share = shares[index]
        noise = (1 - share).sqrt() * (points - share.sqrt() * mean) / (share * std**2 + 1 - share)
        return torch.cat([noise, fractions[index].expand_as(points)], dim=-1)

    return network


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-0.7, 2.0)])
@pytest.mark.parametrize("steps", [100, 10])
def test_sampling_gives_the_gaussian(mean: float, std: float, steps: int) -> None:
    schedule = respaced(cosine_schedule(STEPS), steps)
    draws = torch.randn(steps + 1, 20_000, 1, generator=torch.Generator().manual_seed(steps))
    samples = diffuse_back(gaussian_network(schedule, mean, std), schedule, draws).flatten().numpy()
    assert scipy.stats.kstest(samples, "norm", (mean, std)).pvalue > 1e-6
    assert scipy.stats.kstest(samples, "norm", (mean, 1.1 * std)).pvalue < 1e-6


@pytest.mark.parametrize("fraction", [-1.0, 0.0, 1.0])
def test_sampling_gives_two_points(fraction: float) -> None:
    schedule = respaced(cosine_schedule(STEPS), 100)
    shares = single(retained(list(range(STEPS))))
    low, high, share_high = -0.5, 1.0, 0.7

    def network(points: Tensor, times: Tensor) -> Tensor:
        share = shares[times][..., None]
        signal = share.sqrt()
        log_odds = signal * (high - low) * (points - signal * (high + low) / 2) / (1 - share)
        data = low + (high - low) * (log_odds + math.log(share_high / (1 - share_high))).sigmoid()
        noise = (points - signal * data) / (1 - share).sqrt()
        return torch.cat([noise, torch.full_like(points, fraction)], dim=-1)

    rows = 20_000
    draws = torch.randn(101, rows, 1, generator=torch.Generator().manual_seed(0))
    samples = diffuse_back(network, schedule, draws)
    upper = samples > 0.25
    assert (samples - torch.where(upper, high, low)).abs().max() < 0.01
    # 100 steps of 1000 are near the exact process, not on it.
    assert abs(upper.float().mean() - share_high) < 5 * math.sqrt(0.7 * 0.3 / rows) + 0.01


def test_sampling_uses_each_draw_once_and_none_for_the_last_step() -> None:
    schedule = respaced(cosine_schedule(STEPS), 5)
    draws = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    told: list[int] = []

    def network(points: Tensor, times: Tensor) -> Tensor:
        told.extend(times.unique().tolist())
        return torch.zeros(*points.shape[:-1], 4)

    diffuse_back(network, schedule, draws).sum().backward()
    assert told == [999, 749, 500, 250, 0]
    assert draws.grad is not None
    assert [bool(gradient.ne(0).all()) for gradient in draws.grad] == [True] * 5 + [False]


def test_the_noise_of_a_step_is_added() -> None:
    # A network that predicts no noise, half way between the two variances; the last step only rescales.
    schedule = respaced(cosine_schedule(20), 2)
    start = torch.zeros(3, 1, 1)
    noise = start.index_fill(0, torch.tensor([1]), 1.0)

    def network(points: Tensor, times: Tensor) -> Tensor:
        return torch.zeros(*points.shape[:-1], 2)

    smallest, largest = schedule.log_variances
    std = (0.25 * (smallest[1] + largest[1])).exp()
    difference = diffuse_back(network, schedule, noise) - diffuse_back(network, schedule, start)
    torch.testing.assert_close(difference.squeeze(), std / schedule.signal[0])


@pytest.fixture()
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Data and noise [3, 999, 2], and every time step but the first."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, STEPS - 1, 2, generator=generator)
    return data, torch.arange(1, STEPS).expand(3, -1), noise


def test_loss_of_an_oracle_is_zero(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    data, times, noise = batch
    oracle = torch.cat([noise, torch.full_like(noise, -1)], dim=-1)
    loss = diffusion_loss(lambda *_: oracle, cosine_schedule(STEPS), data, times, noise)
    assert torch.equal(loss.noise_error, torch.zeros(3, STEPS - 1))
    torch.testing.assert_close(loss.bound, torch.zeros(3, STEPS - 1), rtol=0, atol=1e-5)


def test_network_sees_the_diffused_data(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    data, times, noise = batch
    share = single(retained(list(range(STEPS))))[times][..., None]

    def network(points: Tensor, told: Tensor) -> Tensor:
        torch.testing.assert_close(points, share.sqrt() * data + (1 - share).sqrt() * noise, rtol=1e-5, atol=1e-5)
        assert torch.equal(told, times)
        return torch.zeros(*points.shape[:-1], 4)

    loss = diffusion_loss(network, cosine_schedule(STEPS), data, times, noise)
    torch.testing.assert_close(loss.noise_error, noise.square().mean(dim=-1))


def test_bound_is_the_divergence_of_two_normals_in_bits(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    data, times, noise = batch
    generator = torch.Generator().manual_seed(1)
    predicted = noise + 0.3 * torch.randn(noise.shape, generator=generator)
    fraction = 2 * torch.rand(noise.shape, generator=generator) - 1
    schedule = cosine_schedule(STEPS)
    network_output = torch.cat([predicted, fraction], dim=-1)
    loss = diffusion_loss(lambda *_: network_output, schedule, data, times, noise)

    now = torch.from_numpy(retained(list(range(STEPS))))
    kept = now[1:] / now[:-1]
    of_data, of_noisy, variance = (torch.from_numpy(values)[:, None] for values in bayes(schedule))
    noisy = now[1:, None].sqrt() * data + (1 - now[1:, None]).sqrt() * noise
    truth = torch.distributions.Normal(of_data * data + of_noisy * noisy, variance.sqrt())
    # The mean in the form of Ho et al. (2020), equation 11.
    mean = (noisy - ((1 - kept) / (1 - now[1:]).sqrt())[:, None] * predicted) / kept[:, None].sqrt()
    share = (fraction + 1) / 2
    log_variance = share * (1 - kept[:, None]).log() + (1 - share) * variance.log()
    model = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    bits = torch.distributions.kl_divergence(truth, model).mean(dim=-1) / math.log(2)
    torch.testing.assert_close(loss.bound, bits.float(), rtol=1e-3, atol=1e-5)


def test_bound_teaches_the_variance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, STEPS, 3, generator=generator)
    output = torch.randn(STEPS, 6, generator=generator).requires_grad_()
    loss = diffusion_loss(lambda *_: output, cosine_schedule(STEPS), data, torch.arange(STEPS), noise)
    of_error, of_bound = (torch.autograd.grad(term.sum(), output, retain_graph=True)[0] for term in loss)
    assert torch.all(of_bound[:, :3] == 0)
    assert torch.all(of_bound[:, 3:].abs().sum(dim=-1) > 0)
    assert torch.all(of_error[:, :3] != 0)
    assert torch.all(of_error[:, 3:] == 0)


def test_first_step_is_a_binned_likelihood() -> None:
    schedule = cosine_schedule(STEPS)
    generator = torch.Generator().manual_seed(0)
    data = torch.cat([torch.tensor([-1.2, -1.0, 1.0, 1.3]), 1.8 * torch.rand(200, generator=generator) - 0.9])[:, None]
    noise, error, fraction = torch.randn(3, len(data), 1, generator=generator)
    fraction = fraction.clamp(-1, 1)
    output = torch.cat([noise + error, fraction], dim=-1)
    times = torch.zeros(len(data), dtype=torch.int64)
    probability = torch.exp2(-diffusion_loss(lambda *_: output, schedule, data, times, noise).bound).numpy()

    first, second = retained([0, 1])
    beta, least = 1 - first, (1 - first) * (1 - second / first) / (1 - second)
    share = (fraction.numpy()[:, 0].astype(float) + 1) / 2
    std = np.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(least)))
    value = data.numpy()[:, 0].astype(float)
    mean = value - math.sqrt(1 / first - 1) * error.numpy()[:, 0]
    lower = np.where(value < -0.999, -np.inf, value - 1 / 255)
    upper = np.where(value > 0.999, np.inf, value + 1 / 255)
    expected = scipy.stats.norm.cdf(upper, mean, std) - scipy.stats.norm.cdf(lower, mean, std)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(probability, expected, rtol=0, atol=1e-3)


def test_first_step_of_an_impossible_guess_stays_finite() -> None:
    output = torch.tensor([[1e4, 0.0]], requires_grad=True)
    zero = torch.zeros(1, 1)
    loss = diffusion_loss(lambda *_: output, cosine_schedule(STEPS), zero, torch.zeros(1, dtype=torch.int64), zero)
    assert loss.bound.item() == pytest.approx(12 * math.log2(10), rel=1e-4)
    loss.bound.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="allowed are 2 to 1000"):
        respaced(cosine_schedule(1000), steps)


def test_a_start_taken_for_noise_forgives_the_network_its_error() -> None:
    """A network that is a little off, and knows only the points that noisy data reaches, as trained ones do."""
    schedule = respaced(cosine_schedule(1000), 100)
    whole = cosine_schedule(1000)
    mean, std = 1.0, 0.5

    def network(noisy: Tensor, times: Tensor) -> Tensor:
        signal, noise = whole.signal[times][..., None], whole.noise[times][..., None]
        exact = noise * (noisy.clamp(-4, 4) - signal * mean) / (signal**2 * std**2 + noise**2)
        return torch.cat([exact + 0.03, torch.zeros_like(exact)], dim=-1)

    draws = torch.randn(101, 4000, 1, generator=torch.Generator().manual_seed(0))
    as_published, forgiving = (diffuse_back(network, schedule, draws, choice) for choice in (False, True))
    assert (as_published.mean() - mean).abs() > 10
    assert (forgiving.mean() - mean).abs() < 0.1
    assert abs(float(forgiving.std()) - std) < 0.05
