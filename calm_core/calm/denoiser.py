"""The network of the diffusion and flow-matching heads: an MLP under adaptive layer norms (paper, section 3).

A noisy latent goes in; the time step and the backbone's hidden state together shift, scale and gate every block
(adaLN, as in DiT by Peebles and Xie, 2023, and in the diffusion loss of MAR by Li et al., 2024).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calm_core.calm.head import by_position
from calm_core.nn.draws import Draws
from calm_core.nn.layers import NORM_EPSILON, LayerNorm

TIME_FREQUENCIES = 256
"""Sines and cosines that a time step is embedded in, together."""

MAX_PERIOD = 10_000.0


def time_features(times: Tensor) -> Tensor:
    """Cosines, then sines, of time steps [...] at falling frequencies, [..., 256] float32."""
    half = TIME_FREQUENCIES // 2
    # Float32 also under autocast: bf16 cannot tell neighbouring steps above 256 apart. Cosines before sines is DiT's
    # order, on which imported weights of the projection rely.
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
    samples: int, positions: int, latent_size: int, to_times: Callable[[Tensor], Tensor], draws: Draws
) -> DenoisingDraws:
    """N = ``samples`` draws a position; ``to_times`` makes times of uniform numbers in [0, 1)."""
    # The names are part of what a seed means.
    return DenoisingDraws(
        targets=by_position(draws.normal("targets", samples, positions, latent_size)),
        times=to_times(by_position(draws.uniform("times", samples, positions))),
        noise=by_position(draws.normal("noise", samples, positions, latent_size)),
    )


class AdaptiveBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift); shift, scale and gate are linear in silu(condition)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        # Zeroed by ``Denoiser.zero_output``, it gives shift, scale and gate 0: the identity (adaLN-Zero).
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 3 * size))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        # Under autocast a linear gives bf16, whose 8 bits would round a small scale away in 1 + scale. A float32 gate
        # also keeps the residual stream in float32.
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
        # No gain and bias of its own: the modulation scales and shifts what it normalises.
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.output = nn.Linear(hidden_size, output_size)

    def zero_output(self) -> None:
        """Set the last linear and every modulation to zero: training starts from predicting zero."""
        for name, parameter in self.named_parameters():
            # The leading dot lets this module's own "modulation." match as those of its blocks do.
            if name.startswith("output.") or ".modulation." in f".{name}":
                nn.init.zeros_(parameter)

    def condition(self, hidden_states: Tensor) -> Tensor:
        """What ``forward`` needs of hidden states [..., hidden]; the same at every time step."""
        return self.condition_projection(hidden_states).float()

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """``times`` [...] are those of training, 0 to 999; ``condition`` may lack leading dimensions of ``noisy``."""
        # The sum broadcasts: the projected hidden state has no dimension for samples, the time embedding has.
        condition = self.time_projection(time_features(times)).float() + condition
        x = self.input_projection(noisy).float()
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).float().chunk(2, dim=-1)
        return self.output(self.norm(x) * (1 + scale) + shift).float()


def denoiser_weights(blocks: int, hidden_size: int, latent_size: int, output_size: int, calls: int) -> int:
    """Matrix weights that a position passes through in ``calls`` calls; its hidden state is projected once."""
    # A block has two linears of D^2 and a modulation of 3 D^2. Once a call: the time projection's second linear (D^2),
    # the last modulation (2 D^2), and what leads from frequencies and latents to D and from D to the output.
    ends = (TIME_FREQUENCIES + latent_size + output_size) * hidden_size + 3 * hidden_size**2
    return hidden_size**2 + calls * (blocks * 5 * hidden_size**2 + ends)
