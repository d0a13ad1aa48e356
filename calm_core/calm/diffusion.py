"""Denoising diffusion with a learned variance: the cosine schedule, the hybrid loss, respaced sampling.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. A network predicts the noise and, for each dimension, where between its two
extremes the log-variance of a step back lies (Ho et al., 2020; Nichol and Dhariwal, 2021; paper, section 3, "other
heads"). Sampling takes fewer steps than training knows, on the schedule that they leave.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""Noisy points [..., size] and time steps [...] int64 -> [..., 2 size]: the noise, then the variance's fraction."""

OFFSET, MAX_BETA = 0.008, 0.999
"""Of the cosine schedule (Nichol and Dhariwal, section 3.2)."""

BIN = 1 / 255
"""Half the width of the bin that the last step's likelihood integrates over, a legacy of eight-bit images."""

SMALLEST_PROBABILITY = 1e-12


class Schedule:
    """What every time step needs, from the share ``retained`` (a_t) [steps] float64 of the data's variance at it."""

    def __init__(self, retained: np.ndarray, time_steps: list[int]) -> None:
        self.time_steps = time_steps
        self._copies: dict[torch.device, Tables] = {}
        # Float64, since 1 - a_t begins at 4e-5, of which float32 would keep three digits. Betas are ratios of
        # neighbouring a_t: those of a respaced schedule then cover the steps that it leaves out.
        before = np.append(1.0, retained[:-1])
        self._betas = 1 - retained / before
        # Multiplied up again, as in the code of Nichol and Dhariwal, for the same rounding.
        self._retained, self._before = np.cumprod(1 - self._betas), np.append(1.0, np.cumprod(1 - self._betas)[:-1])

    def __len__(self) -> int:
        return len(self.time_steps)

    def on(self, device: torch.device) -> "Tables":
        """The tables, on ``device``: copied there once, and not at each step of each sample."""
        if device not in self._copies:
            pairs = (self.inverse, self.posterior_mean, self.log_variances)
            moved = ((one.to(device), other.to(device)) for one, other in pairs)
            self._copies[device] = Tables(self.signal.to(device), self.noise.to(device), *moved)
        return self._copies[device]

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(a_t) [steps]."""
        return _single(np.sqrt(self._retained))

    @cached_property
    def noise(self) -> Tensor:
        """sqrt(1 - a_t) [steps]."""
        return _single(np.sqrt(1 - self._retained))

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor]:
        """x_0 = first * x_t - second * noise."""
        return _single(np.sqrt(1 / self._retained)), _single(np.sqrt(1 / self._retained - 1))

    @cached_property
    def posterior_mean(self) -> tuple[Tensor, Tensor]:
        """Mean of x_(t-1) given both = first * x_0 + second * x_t."""
        # Ho et al., equation 7.
        first = self._betas * np.sqrt(self._before) / (1 - self._retained)
        return _single(first), _single((1 - self._before) * np.sqrt(1 - self._betas) / (1 - self._retained))

    @cached_property
    def log_variances(self) -> tuple[Tensor, Tensor]:
        """Least and most log-variance of a step back: the posterior's (the first step has the second's), log beta."""
        posterior = self._betas * (1 - self._before) / (1 - self._retained)
        # The posterior's variance at the first step is 0, since x_0 is then known; its logarithm is not finite.
        return _single(np.log(np.append(posterior[1:2], posterior[1:]))), _single(np.log(self._betas))


class Tables(NamedTuple):
    """The tables of a ``Schedule``, by their names there, all on one device."""

    signal: Tensor
    noise: Tensor
    inverse: tuple[Tensor, Tensor]
    posterior_mean: tuple[Tensor, Tensor]
    log_variances: tuple[Tensor, Tensor]


def cosine_schedule(steps: int) -> Schedule:
    """The schedule of training: a_t follows cos^2, its betas capped at 0.999."""

    def share(t: float) -> float:
        return math.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    # The last beta would be 1 without the cap: no signal left, and a division by sqrt(a_t) = 0 on the way back.
    betas = np.array([min(1 - share((t + 1) / steps) / share(t / steps), MAX_BETA) for t in range(steps)])
    return Schedule(np.cumprod(1 - betas), list(range(steps)))


def respaced(schedule: Schedule, steps: int) -> Schedule:
    """``steps`` evenly spread time steps of ``schedule``, first and last among them, as a schedule of their own.

    Raises:
        ValueError: ``steps`` is below 2 or above the steps that there are.
    """
    if not 2 <= steps <= len(schedule):
        raise ValueError(f"{steps} steps of {len(schedule)} are asked for; allowed are 2 to {len(schedule)}")
    stride = (len(schedule) - 1) / (steps - 1)
    kept = [round(index * stride) for index in range(steps)]
    return Schedule(schedule._retained[kept], [schedule.time_steps[index] for index in kept])


class DiffusionLoss(NamedTuple):
    """Both [...], means over dimensions: the squared error of the noise, and the variational bound in bits."""

    noise_error: Tensor
    bound: Tensor


def diffusion_loss(network: Network, schedule: Schedule, data: Tensor, times: Tensor, noise: Tensor) -> DiffusionLoss:
    """The two terms whose sum trains noise and variance; the bound teaches the variance alone.

    ``data`` and standard normal ``noise`` are [..., size], ``times`` [...] are time steps of ``schedule``.
    """
    tables = schedule.on(data.device)

    def at(values: Tensor) -> Tensor:
        return values[times][..., None]

    # Ho et al., equation 4: any x_t in one step.
    noisy = at(tables.signal) * data + at(tables.noise) * noise
    predicted_noise, fraction = network(noisy, times).chunk(2, dim=-1)
    noise_error = (noise - predicted_noise).square().mean(dim=-1)
    # Detached, so that the bound, whose gradient is noisy, does not move the mean (Nichol and Dhariwal, section 3.1).
    mean, log_variance = _step_back(tables, times, noisy, predicted_noise.detach(), fraction)
    of_data, of_noisy = tables.posterior_mean
    true_mean = at(of_data) * data + at(of_noisy) * noisy
    true_log_variance = at(tables.log_variances[0])
    # KL(true step back || predicted one): two normal distributions, dimension by dimension.
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    # The first step back ends at the data itself: there the bound has a likelihood in place of a divergence (Ho et al.,
    # section 3.3).
    likelihood = _binned_log_likelihood(data, mean, 0.5 * log_variance)
    bound = torch.where(times == 0, -likelihood.mean(dim=-1), divergence.mean(dim=-1)) / math.log(2)
    return DiffusionLoss(noise_error, bound)


def diffuse_back(network: Network, schedule: Schedule, draws: Tensor, start_is_noise: bool = False) -> Tensor:
    """Samples [..., size] from standard normal ``draws`` [steps + 1, ..., size]: the start, then each step's noise.

    The cap of the last beta leaves a share of 2e-9 of the data at the start, so that the step away from it multiplies
    the error of the predicted noise: by 340 with 100 steps. ``start_is_noise`` takes the start itself for the
    noise in it there, which it is to within that share.
    """
    # The network gets the step's number in training; the schedule is indexed by its own, respaced, number.
    points, tables = draws[0], schedule.on(draws.device)
    for index in reversed(range(len(schedule))):
        times = torch.full(points.shape[:-1], index, device=points.device)
        noise, fraction = network(points, torch.full_like(times, schedule.time_steps[index])).chunk(2, dim=-1)
        if start_is_noise and index == len(schedule) - 1:
            noise = points
        points, log_variance = _step_back(tables, times, points, noise, fraction)
        # The last step adds no noise: its mean is the sample.
        if index:
            points = points + (0.5 * log_variance).exp() * draws[len(schedule) - index]
    return points


def _step_back(
    tables: Tables, times: Tensor, noisy: Tensor, predicted_noise: Tensor, fraction: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of x_(t-1) given x_t, [..., size]; ``fraction`` in [-1, 1] interpolates the latter."""

    def at(values: Tensor) -> Tensor:
        return values[times][..., None]

    of_noisy, of_noise = tables.inverse
    data = at(of_noisy) * noisy - at(of_noise) * predicted_noise
    of_data, of_noisy = tables.posterior_mean
    smallest, largest = tables.log_variances
    # Interpolated between logarithms (Nichol and Dhariwal, equation 15).
    share = (fraction + 1) / 2
    return at(of_data) * data + at(of_noisy) * noisy, share * at(largest) + (1 - share) * at(smallest)


def _binned_log_likelihood(data: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability [..., size] of the bin around ``data``; the outer bins, beyond 1, reach to infinity."""
    centred, inverse_std = data - mean, (-log_std).exp()
    upper, lower = _normal_cdf(inverse_std * (centred + BIN)), _normal_cdf(inverse_std * (centred - BIN))
    # Clamped before the logarithm: a bin far from the mean has probability 0 in float32.
    inside = torch.where(data > 0.999, 1 - lower, torch.where(data < -0.999, upper, upper - lower))
    return inside.clamp(min=SMALLEST_PROBABILITY).log()


def _normal_cdf(values: Tensor) -> Tensor:
    """The reference's tanh approximation of the normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))


def _single(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()
