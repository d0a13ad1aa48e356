"""Flow matching: learn the velocity that carries noise to data along straight lines, then follow it.

x_t = (1 - t) x_0 + t x_1 moves from noise x_0 to data x_1 at velocity x_1 - x_0. Its mean given x_t, which a
squared error learns, makes an ordinary differential equation with the same marginals at every t
(Lipman et al., 2023; paper, section 3, "other heads").
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Points [..., size] and time steps [...] int64 in 0 to 999 -> velocities [..., size]."""

Solver = Literal["euler", "midpoint"]

TIME_STEPS = 1000
"""The network's time input is floor(1000 t)."""

CALLS = {"euler": 1, "midpoint": 2}
"""Calls of the network in one step of each solver."""


def flow_loss(velocity: Velocity, data: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the velocity, [...], a mean over dimensions.

    ``data`` and standard normal ``noise`` are [..., size], ``times`` [...] are uniform in [0, 1).
    """
    t = times[..., None]
    points = (1 - t) * noise + t * data
    # Times in [0, 1) give steps 0 to 999, the range of the diffusion head's time input.
    return (velocity(points, (times * TIME_STEPS).long()) - (data - noise)).square().mean(dim=-1)


def integrate(velocity: Velocity, noise: Tensor, steps: int, solver: Solver) -> Tensor:
    """Follow ``velocity`` from ``noise`` [..., size] at t = 0 to t = 1 in ``steps`` equal steps."""
    points, step = noise, 1 / steps

    def at(points: Tensor, half_steps: int) -> Tensor:
        # floor(1000 t) in integers: t = 0.3 must not become 299.
        time = half_steps * TIME_STEPS // (2 * steps)
        return velocity(points, torch.full(points.shape[:-1], time, device=points.device))

    for index in range(steps):
        slope = at(points, 2 * index)
        if solver == "midpoint":
            # Second order: the slope in the middle of the step, reached with the slope at its start.
            slope = at(points + step / 2 * slope, 2 * index + 1)
        points = points + step * slope
    return points
