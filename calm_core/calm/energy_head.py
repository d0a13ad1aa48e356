"""The energy head: one pass turns noise and a hidden state into one sample of the next latent (paper, section 3).

Notable:
- a stack of residual blocks refines projected noise under the backbone's hidden state, one pass a sample;
- the energy score trains it, of the latents and, if asked, of their images in other spaces;
- what a hidden state alone decides is computed once for all of its samples;
- about 10 % of a model's parameters.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.autoencoder.model import Posterior
from calm_core.calm.energy_score import energy_score, energy_score_of_normal
from calm_core.calm.head import HeadLoss, HeadObjective, by_position
from calm_core.nn.draws import Draws
from calm_core.nn.layers import LayerNorm
from calm_core.nn.limits import Layers, Width


@dataclass(frozen=True)
class EnergyHeadConfig:
    """Shape of an energy head; the defaults are the published ones."""

    blocks: Layers = 4
    noise_size: Width = 64
    kind: Literal["energy"] = "energy"

    def build(self, hidden_size: int, latent_size: int) -> "EnergyHead":
        return EnergyHead(self, hidden_size, latent_size)

    def training_weights(self, hidden_size: int, latent_size: int, samples: int) -> int:
        # As the paper counts: every sample pays for the projection of the hidden state.
        return samples * self.sampling_weights(hidden_size, latent_size)

    def sampling_weights(self, hidden_size: int, latent_size: int) -> int:
        # A block is 2 D^2 + D^2 + 2 D^2 in its MLP and D^2 in down; the projected hidden state and the output's first
        # linear are the 2 D^2.
        ends = (self.noise_size + latent_size) * hidden_size + 2 * hidden_size**2
        return self.blocks * 6 * hidden_size**2 + ends


class EnergyDraws(NamedTuple):
    """Randomness of one training step over P positions."""

    noise: Tensor
    """[N, P, noise_size] uniform in [-0.5, 0.5)"""
    targets: Tensor
    """[M / 2, latent] standard normal: one half of M targets that all positions share"""
    scored_targets: Tensor
    """[M', P, latent] standard normal: the targets that are mapped into other spaces"""


class EnergyBlock(nn.Module):
    """x + down(silu(gate) * up), with gate and up from the normed x beside the condition, [..., hidden]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(size)
        self.mlp = nn.Sequential(
            nn.Linear(2 * size, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 2 * size)
        )
        self.down = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        # The first linear takes x and the condition side by side. As the sum of two products it needs no copy of the
        # condition for each sample, and multiplies it once.
        first, *others = self.mlp
        assert isinstance(first, nn.Linear)
        of_hidden_states, of_condition = first.weight.chunk(2, dim=1)
        mixed = F.linear(self.norm(hidden_states), of_hidden_states) + F.linear(condition, of_condition, first.bias)
        for layer in others:
            mixed = layer(mixed)
        gate, up = mixed.chunk(2, dim=-1)
        return hidden_states + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """Hidden states [..., hidden] and noise [..., noise_size] -> latents [..., latent] float32; see ``head.Head``."""

    def __init__(self, config: EnergyHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        self.noise_projection = nn.Linear(config.noise_size, hidden_size)
        self.noise_norm = LayerNorm(hidden_size)
        self.condition_projection = nn.Linear(hidden_size, hidden_size)
        self.condition_norm = LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(EnergyBlock(hidden_size) for _ in range(config.blocks))
        self.norm = LayerNorm(hidden_size)
        self.output = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, latent_size))

    def zero_output(self) -> None:
        # All samples then start at the origin. Pairs that coincide have no gradient, so fidelity alone drives the first
        # step.
        for parameter in self.output[-1].parameters():
            nn.init.zeros_(parameter)

    def training_draws(self, positions: int, objective: HeadObjective, draws: Draws) -> EnergyDraws:
        scored = objective.scored_targets if objective.spaces else 0
        # The names are part of what a seed means.
        return EnergyDraws(
            by_position(draws.uniform("noise", objective.samples, positions, self.config.noise_size)) - 0.5,
            draws.shared_normal("targets", objective.target_samples // 2, self.latent_size),
            by_position(draws.normal("scored targets", scored, positions, self.latent_size)),
        )

    def loss(
        self, hidden_states: Tensor, posterior: Posterior, draws: EnergyDraws, objective: HeadObjective
    ) -> HeadLoss:
        return energy_loss(self.sample(hidden_states, draws.noise), posterior, draws, objective)

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise [*shape, noise_size], uniform in [-0.5, 0.5)."""
        return torch.rand(*shape, self.config.noise_size, generator=generator, device=generator.device) - 0.5

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        # Under autocast linears give bf16; norms and the residual stream x stay in float32.
        condition = self.condition_norm(self.condition_projection(hidden_states).float())
        x = self.noise_norm(self.noise_projection(draws).float())
        for block in self.blocks:
            x = block(x, condition)
        return self.output(self.norm(x)).float()


def energy_loss(samples: Tensor, posterior: Posterior, draws: EnergyDraws, objective: HeadObjective) -> HeadLoss:
    """Energy score of latent ``samples`` [N, P, latent] against targets from ``posterior``, averaged over positions.

    The published loss scores the latents as they are. Each of ``objective.spaces`` adds the score of their images,
    averaged over parts and, to save work, over ``scored_targets`` targets alone; a sum of proper
    scores is proper, and strictly so while the latent term is there. ``terms`` are fidelity and diversity,
    added over spaces; ``total`` is their difference.
    """
    scores = [energy_score_of_normal(samples, posterior.mean, posterior.log_std.exp(), draws.targets, objective.alpha)]
    for space in objective.spaces:
        # The score has no gradient for targets. Images are [N, P, parts, size]; flattened, each part counts as a
        # position.
        with torch.no_grad():
            target_images = space(posterior.sample(draws.scored_targets)).flatten(1, 2).float()
        scores.append(energy_score(space(samples).flatten(1, 2).float(), target_images, objective.alpha))
    total, fidelity, diversity = (
        torch.stack([values.mean() for values in of_spaces]).sum() for of_spaces in zip(*scores, strict=True)
    )
    return HeadLoss(total, {"fidelity": fidelity.detach(), "diversity": diversity.detach()})
