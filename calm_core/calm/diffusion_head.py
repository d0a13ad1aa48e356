"""The diffusion head: a denoiser that predicts noise and variance, run backwards (paper, section 3, "other heads")."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Posterior
from calm_core.calm.denoiser import Denoiser, DenoisingDraws, denoiser_weights, draw_denoising
from calm_core.calm.diffusion import cosine_schedule, diffuse_back, diffusion_loss, respaced
from calm_core.calm.head import HeadLoss, HeadObjective
from calm_core.nn.draws import Draws
from calm_core.nn.limits import Layers, SamplingSteps


@dataclass(frozen=True)
class DiffusionHeadConfig:
    """Shape and steps of a diffusion head; the defaults are the published ones."""

    blocks: Layers = 4
    training_steps: SamplingSteps = 1000
    sampling_steps: SamplingSteps = 100
    start_is_noise: bool = False
    """See ``diffusion.diffuse_back``; what this project trains sets it."""
    kind: Literal["diffusion"] = "diffusion"

    def build(self, hidden_size: int, latent_size: int) -> "DiffusionHead":
        return DiffusionHead(self, hidden_size, latent_size)

    def training_weights(self, hidden_size: int, latent_size: int, samples: int) -> int:
        return denoiser_weights(self.blocks, hidden_size, latent_size, 2 * latent_size, samples)

    def sampling_weights(self, hidden_size: int, latent_size: int) -> int:
        return denoiser_weights(self.blocks, hidden_size, latent_size, 2 * latent_size, self.sampling_steps)


class DiffusionHead(nn.Module):
    """Hidden states [..., hidden] and noise [steps + 1, ..., latent] -> latents [..., latent]; see ``head.Head``."""

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        # Two outputs a dimension: the noise, and the variance's fraction.
        self.denoiser = Denoiser(config.blocks, hidden_size, latent_size, 2 * latent_size)
        # Plain objects, not buffers: they follow from the config, so the weights' file does not hold them.
        self.training_schedule = cosine_schedule(config.training_steps)
        self.sampling_schedule = respaced(self.training_schedule, config.sampling_steps)

    def zero_output(self) -> None:
        self.denoiser.zero_output()

    def training_draws(self, positions: int, objective: HeadObjective, draws: Draws) -> DenoisingDraws:
        """``times`` are uniform over the training steps."""

        def to_times(uniform: Tensor) -> Tensor:
            return (uniform * self.config.training_steps).long()

        return draw_denoising(objective.samples, positions, self.latent_size, to_times, draws)

    def loss(
        self, hidden_states: Tensor, posterior: Posterior, draws: DenoisingDraws, objective: HeadObjective
    ) -> HeadLoss:
        # Before the closure: N samples share one projection of their hidden state.
        condition = self.denoiser.condition(hidden_states)
        noise_error, bound = diffusion_loss(
            lambda x, times: self.denoiser(x, times, condition),
            self.training_schedule,
            posterior.sample(draws.targets),
            draws.times,
            draws.noise,
        )
        # The bound has weight 1 because it is one step's term: over 1000 steps, the sum of all terms estimated from one
        # of them and weighted by 0.001 (the hybrid loss of Nichol and Dhariwal, equation 16) is the same.
        terms = {"noise_error": noise_error.mean(), "variational_bound": bound.mean()}
        return HeadLoss(
            terms["noise_error"] + terms["variational_bound"], {name: term.detach() for name, term in terms.items()}
        )

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The starting points and each step's noise, [steps + 1, *shape, latent], standard normal."""
        steps = self.config.sampling_steps + 1
        return torch.randn(steps, *shape, self.latent_size, generator=generator, device=generator.device)

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        condition = self.denoiser.condition(hidden_states)

        def network(noisy: Tensor, times: Tensor) -> Tensor:
            return self.denoiser(noisy, times, condition)

        return diffuse_back(network, self.sampling_schedule, draws, self.config.start_is_noise)
