"""Training CALM on the encoded corpus (paper, section 3)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calm_core.autoencoder import Autoencoder
from calm_core.calm import Calm, CalmConfig, energy_loss
from calm_core.errors import CalmError
from calm_core.latent_files import LatentCorpus
from calm_core.params import Params
from calm_core.randomness import generator
from calm_core.token_files import TokenStream
from calm_core.training import batch_indices, train

STAGE = "train_calm"

SCORED_TARGETS = 1
"""Target samples a position whose decoder states are scored; they hardly differ from one another."""

OBSERVED_POSITIONS = 1024
"""Positions of a training batch at which the distance from the manifold is observed."""


def train_calm(
    params: Params,
    tokens: TokenStream,
    latents: LatentCorpus,
    autoencoder: Autoencoder,
    log: Callable[[int, Mapping[str, float]], None],
) -> Calm:
    """Train a fresh CALM on the training split; ``log`` is that of ``training.train``.

    Raises:
        CalmError: the split is shorter than one context and the patch that follows it.
    """
    section, seed = params.calm, params.seed
    patch_size = autoencoder.config.patch_size
    context = section.context_tokens // patch_size
    blocks = (len(latents) - 1) // context
    if blocks < 1:
        raise CalmError(
            f"the training split has {len(tokens)} tokens, fewer than calm.context_tokens {section.context_tokens} "
            f"and a patch; use more text or a shorter context"
        )
    model = Calm(CalmConfig.from_params(section, autoencoder.config))
    model.initialise(generator(seed, STAGE, "weights"))
    spaces = (autoencoder.hidden_states,) if section.decoder_score else ()

    def sample_next(step: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples [N, positions, latent] of the batch of ``step``, and the positions' targets in the stream."""
        starts = batch_indices(step, section.batch_sequences, blocks, seed, STAGE) * context
        patches = tokens.windows(starts * patch_size, section.context_tokens).unflatten(-1, (-1, patch_size))
        hidden_states = model(patches).flatten(0, 1)
        noise = model.head.draw((section.samples, len(hidden_states)), draws)
        targets = (starts[:, None] + torch.arange(1, context + 1)).flatten()
        return model.head(hidden_states, noise), targets

    last_samples: list[Tensor] = []

    def objective(step: int) -> Mapping[str, Tensor]:
        draws = generator(seed, STAGE, "step", step)
        samples, positions = sample_next(step, draws)
        posterior = latents.posterior(positions)
        noise = torch.randn(section.target_samples, *posterior.mean.shape, generator=draws)
        loss = energy_loss(samples, posterior.sample(noise), section.alpha, spaces, SCORED_TARGETS)
        last_samples[:] = [samples[0, :OBSERVED_POSITIONS].detach()]
        return {"loss": loss.total, "fidelity": loss.fidelity, "diversity": loss.diversity}

    def observe() -> Mapping[str, float]:
        return {"manifold_distance": float(manifold_distance(autoencoder, last_samples[0]).mean())}

    tokens_per_step = section.batch_sequences * section.context_tokens
    train(model, objective, section, params.runtime, "calm", log, tokens_per_step, observe)
    return model


@torch.no_grad()
def manifold_distance(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Root mean square, a dimension, between latents [..., latent] and the encoding of what they decode to, [...]."""
    nearest = autoencoder.encode(autoencoder.decode(latents)).mean
    return (latents - nearest).square().mean(dim=-1).sqrt()
