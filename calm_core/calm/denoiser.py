"""The network of the diffusion and flow-matching heads: an MLP under adaptive layer norms (paper, section 3).

A noisy latent goes in; the time step and the backbone's hidden state together shift, scale and gate every block
(adaLN, as in DiT by Peebles and Xie, 2023, and in the diffusion loss of MAR by Li et al., 2024).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calm_core.calm.head import draw_positions
from calm_core.nn.layers import NORM_EPSILON

TIME_FREQUENCIES = 256
"""Sines and cosines that a time step is embedded in, together."""

MAX_PERIOD = 10_000.0


def time_features(times: Tensor) -> Tensor:
    """Cosines, then sines, of time steps [...] at falling frequencies, [..., 256] float32."""
    half = TIME_FREQUENCIES // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=times.device) / half
    frequencies = exponents.exp()
    angles = times.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DenoisingDraws(NamedTuple):
    """Randomness of one training step over P positions, N targets each."""

    targets: Tensor
    """[N, P, latent] standard normal"""
    times: Tensor
    """[N, P], as the head draws them"""
    noise: Tensor
    """[N, P, latent] standard normal"""


def draw_denoising(
    shape: tuple[int, int, int],
    draw_times: Callable[[tuple[int, int], torch.Generator], Tensor],
    generators: Sequence[torch.Generator],
) -> DenoisingDraws:
    """Draws of ``shape`` [N, positions, latent] from each of ``generators``, position after position."""

    def normal(generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return DenoisingDraws(
        targets=draw_positions(normal, generators),
        times=draw_positions(lambda generator: draw_times(shape[:2], generator), generators),
        noise=draw_positions(normal, generators),
    )


class AdaptiveBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift); shift, scale and gate are linear in silu(condition)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=NORM_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 3 * size))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).float().chunk(3, dim=-1)
        return hidden_states + gate * self.mlp(self.norm(hidden_states) * (1 + scale) + shift)


class Denoiser(nn.Module):
    """Noisy latents [..., latent], time steps and hidden states [..., hidden] -> [..., output_size] float32."""

    def __init__(self, blocks: int, hidden_size: int, latent_size: int, output_size: int) -> None:
        super().__init__()
        self.time_projection = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.condition_projection = nn.Linear(hidden_size, hidden_size)
        self.input_projection = nn.Linear(latent_size, hidden_size)
        self.blocks = nn.ModuleList(AdaptiveBlock(hidden_size) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.output = nn.Linear(hidden_size, output_size)

    def zero_output(self) -> None:
        """Set the last linear and every modulation to zero: training starts from predicting zero."""
        for name, parameter in self.named_parameters():
            if name.startswith("output.") or ".modulation." in f".{name}":
                nn.init.zeros_(parameter)

    def condition(self, hidden_states: Tensor) -> Tensor:
        """What ``forward`` needs of hidden states [..., hidden]; the same at every time step."""
        return self.condition_projection(hidden_states).float()

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """``times`` [...] are those of training, 0 to 999; ``condition`` may lack leading dimensions of ``noisy``."""
        condition = self.time_projection(time_features(times)).float() + condition
        x = self.input_projection(noisy).float()
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).float().chunk(2, dim=-1)
        return self.output(self.norm(x) * (1 + scale) + shift).float()


def denoiser_weights(blocks: int, hidden_size: int, latent_size: int, output_size: int, calls: int) -> int:
    """Matrix weights that a position passes through in ``calls`` calls; its hidden state is projected once."""
    ends = (TIME_FREQUENCIES + latent_size + output_size) * hidden_size + 3 * hidden_size**2
    return hidden_size**2 + calls * (blocks * 5 * hidden_size**2 + ends)
