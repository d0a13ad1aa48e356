"""The energy head: one pass turns noise and a hidden state into one sample of the next latent (paper, section 3).

A stack of residual blocks refines projected noise under the backbone's hidden state. There is no
likelihood; the energy score trains it. About 10 % of a model's parameters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.layers import NORM_EPSILON


@dataclass(frozen=True)
class EnergyHeadConfig:
    """Shape of an energy head beside the hidden size of its backbone."""

    blocks: int = 4
    noise_size: int = 64


class EnergyBlock(nn.Module):
    """x + down(silu(gate) * up), with gate and up from the normed x beside the condition, [..., hidden]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=NORM_EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(2 * size, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 2 * size)
        )
        self.down = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        gate, up = self.mlp(torch.cat([self.norm(hidden_states), condition], dim=-1)).chunk(2, dim=-1)
        return hidden_states + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """Hidden states [..., hidden] and noise [..., noise_size] -> latents [..., latent] float32."""

    def __init__(self, config: EnergyHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config = config
        self.noise_projection = nn.Linear(config.noise_size, hidden_size)
        self.noise_norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON)
        self.condition_projection = nn.Linear(hidden_size, hidden_size)
        self.condition_norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON)
        self.blocks = nn.ModuleList(EnergyBlock(hidden_size) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON)
        self.output = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, latent_size))

    def zero_output(self) -> None:
        """Set the last linear to zero, so that training starts from samples at the origin."""
        for parameter in self.output[-1].parameters():
            nn.init.zeros_(parameter)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise for ``shape`` samples, [*shape, noise_size], uniform in [-0.5, 0.5)."""
        device = generator.device
        return torch.rand(*shape, self.config.noise_size, generator=generator, device=device) - 0.5

    def forward(self, hidden_states: Tensor, noise: Tensor) -> Tensor:
        """One sample for each noise vector; ``hidden_states`` may lack leading dimensions of ``noise``."""
        condition = self.condition_norm(self.condition_projection(hidden_states).float())
        x = self.noise_norm(self.noise_projection(noise).float())
        condition = condition.expand_as(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.output(self.norm(x)).float()
