"""The solver against differential equations with known solutions, the loss against conditional means."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from calm_core.calm.flow_matching import CALLS, Solver, flow_loss, integrate


def gaussian_velocity(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_1 - x_0 | x_t] of standard normal x_0 and x_1 from N(mean, std^2)."""

    def velocity(points: Tensor, times: Tensor) -> Tensor:
        t = times[..., None].to(points.dtype) / 1000
        covariance = t * std**2 - (1 - t)
        return mean + covariance / (t**2 * std**2 + (1 - t) ** 2) * (points - t * mean)

    return velocity


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    # dx/dt = 3 t^2 x, so x(1) = x(0) e. Every call of the network falls on a whole thousandth.
    start = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    counts = (25, 50, 100, 250)

    def velocity(points: Tensor, times: Tensor) -> Tensor:
        return 3 * (times[..., None].double() / 1000) ** 2 * points

    errors = [float((integrate(velocity, start, steps, solver) - math.e * start).abs().max()) for steps in counts]
    for (few, large), (many, small) in itertools.pairwise(zip(counts, errors, strict=True)):
        assert math.log(large / small) / math.log(many / few) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_straight_lines_take_one_step(solver: Solver) -> None:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    end = torch.arange(3.0)
    torch.testing.assert_close(integrate(lambda *_: end - start, start, 1, solver), end.expand(5, 3))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.3), (-1.0, 1.7)])
def test_exact_velocity_carries_noise_to_the_gaussian(mean: float, std: float) -> None:
    # The flow keeps quantiles: noise z arrives at mean + std z.
    noise = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
    samples = integrate(gaussian_velocity(mean, std), noise, 250, "midpoint")
    torch.testing.assert_close(samples, mean + std * noise, rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 35, 50, 70, 100, 1000])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_network_is_told_whole_thousandths(solver: Solver, steps: int) -> None:
    told: list[Tensor] = []

    def velocity(points: Tensor, times: Tensor) -> Tensor:
        told.append(times)
        return points

    integrate(velocity, torch.zeros(2, 3, 4), steps, solver)
    calls = CALLS[solver] * steps
    assert all(times.dtype == torch.int64 and times.shape == (2, 3) for times in told)
    expected = [math.floor(1000 * Fraction(call, calls)) for call in range(calls)]
    assert [times.unique().tolist() for times in told] == [[time] for time in expected]


def test_times_of_ten_steps() -> None:
    told: list[int] = []

    def velocity(points: Tensor, times: Tensor) -> Tensor:
        told.append(int(times[0]))
        return points

    integrate(velocity, torch.zeros(1, 1), 10, "euler")
    assert told == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    told.clear()
    integrate(velocity, torch.zeros(1, 1), 10, "midpoint")
    assert told == list(range(0, 1000, 50))


def test_loss_of_an_oracle_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 4, 50, 3, generator=generator)
    times = torch.rand(4, 50, generator=generator)

    def oracle(points: Tensor, told: Tensor) -> Tensor:
        assert told.dtype == torch.int64
        assert torch.all((told <= 1000 * times) & (1000 * times < told + 1))
        torch.testing.assert_close(points, noise + times[..., None] * (data - noise))
        return data - noise

    assert torch.equal(flow_loss(oracle, data, times, noise), torch.zeros(4, 50))
    doubled = flow_loss(lambda *_: 2 * (data - noise), data, times, noise)
    torch.testing.assert_close(doubled, (data - noise).square().mean(dim=-1))


@pytest.mark.parametrize("time", [0.0, 0.4, 0.9])
def test_conditional_mean_minimises_the_loss(time: float) -> None:
    mean, std, rows = 1.5, 0.6, 200_000
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, rows, 1, generator=generator)
    data = mean + std * data
    times = torch.full((rows,), time)
    exact = gaussian_velocity(mean, std)
    losses = flow_loss(exact, data, times, noise)
    # What is left is the variance of the velocity, given the point.
    left = 1 + std**2 - (time * std**2 - (1 - time)) ** 2 / (time**2 * std**2 + (1 - time) ** 2)
    assert abs(losses.mean() - left) < 5 * losses.std() / math.sqrt(rows)
    for offset, slope in [(0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)]:
        other = flow_loss(lambda x, t, a=offset, b=slope: exact(x, t) + a + b * x, data, times, noise)
        assert other.mean() > losses.mean() + 0.01
