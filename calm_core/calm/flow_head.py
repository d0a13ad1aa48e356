"""The flow-matching head: a denoiser's velocity, followed from noise to a latent (paper, section 3, "other heads")."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Posterior
from calm_core.calm.denoiser import Denoiser, DenoisingDraws, denoiser_weights, draw_denoising
from calm_core.calm.flow_matching import CALLS, Solver, flow_loss, integrate
from calm_core.calm.head import HeadLoss, HeadObjective
from calm_core.nn.draws import Draws
from calm_core.nn.limits import Layers, SamplingSteps


@dataclass(frozen=True)
class FlowHeadConfig:
    """Shape and solver of a flow head; the defaults are the published ones: 20 calls of the network."""

    blocks: Layers = 4
    solver: Solver = "midpoint"
    steps: SamplingSteps = 10
    kind: Literal["flow"] = "flow"

    def build(self, hidden_size: int, latent_size: int) -> "FlowHead":
        return FlowHead(self, hidden_size, latent_size)

    def training_weights(self, hidden_size: int, latent_size: int, samples: int) -> int:
        return denoiser_weights(self.blocks, hidden_size, latent_size, latent_size, samples)

    def sampling_weights(self, hidden_size: int, latent_size: int) -> int:
        return denoiser_weights(self.blocks, hidden_size, latent_size, latent_size, self.steps * CALLS[self.solver])


class FlowHead(nn.Module):
    """Hidden states [..., hidden] and starting points [..., latent] -> latents [..., latent]; see ``head.Head``."""

    def __init__(self, config: FlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        self.denoiser = Denoiser(config.blocks, hidden_size, latent_size, latent_size)

    def zero_output(self) -> None:
        self.denoiser.zero_output()

    def training_draws(self, positions: int, objective: HeadObjective, draws: Draws) -> DenoisingDraws:
        """``times`` are uniform in [0, 1)."""

        return draw_denoising(objective.samples, positions, self.latent_size, lambda uniform: uniform, draws)

    def loss(
        self, hidden_states: Tensor, posterior: Posterior, draws: DenoisingDraws, objective: HeadObjective
    ) -> HeadLoss:
        condition = self.denoiser.condition(hidden_states)
        # Each of the N targets has a time and a noise of its own: N regressions a position (section 3, "other heads").
        data = posterior.sample(draws.targets)
        error = flow_loss(lambda x, times: self.denoiser(x, times, condition), data, draws.times, draws.noise).mean()
        return HeadLoss(error, {"velocity_error": error.detach()})

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Starting points [*shape, latent], standard normal."""
        return torch.randn(*shape, self.latent_size, generator=generator, device=generator.device)

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        condition = self.denoiser.condition(hidden_states)
        steps, solver = self.config.steps, self.config.solver
        return integrate(lambda x, times: self.denoiser(x, times, condition), draws, steps, solver)
