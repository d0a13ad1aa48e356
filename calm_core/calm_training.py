"""Training CALM on the encoded corpus (paper, section 3)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calm_core import params as sections
from calm_core.autoencoder import Autoencoder
from calm_core.calm import Calm, CalmConfig
from calm_core.checkpoints import CheckpointStore
from calm_core.errors import CalmError
from calm_core.head import HeadObjective
from calm_core.latent_files import LatentCorpus
from calm_core.params import Params
from calm_core.randomness import generator
from calm_core.token_files import TokenStream
from calm_core.training import batch_indices, described_batch, train

STAGE = "train_calm"

OBSERVED_POSITIONS = 128
"""Positions of a training batch at which the distance from the manifold is observed, a sample each."""


def head_objective(section: sections.Calm, autoencoder: Autoencoder) -> HeadObjective:
    """What params.yaml asks the head to be trained for."""
    spaces = (autoencoder.hidden_states,) if section.decoder_score else ()
    return HeadObjective(section.samples, section.target_samples, section.alpha, spaces)


def train_calm(
    params: Params,
    tokens: TokenStream,
    latents: LatentCorpus,
    autoencoder: Autoencoder,
    log: Callable[[int, Mapping[str, float]], None],
    checkpoints: CheckpointStore | None = None,
) -> Calm:
    """Train a CALM on the training split; ``log`` and ``checkpoints`` as in ``training.train``.

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
    head = head_objective(section, autoencoder)
    seen: dict[str, Tensor] = {}

    def inputs(patches: Tensor, starts: Tensor, draws: torch.Generator) -> Tensor:
        if section.input == "tokens":
            return patches
        posterior = latents.posterior(starts[:, None] + torch.arange(context))
        return posterior.sample(torch.randn(posterior.mean.shape, generator=draws))

    def patch_starts(step: int) -> Tensor:
        return batch_indices(step, section.batch_sequences, blocks, seed, STAGE) * context

    def batch_of(step: int) -> str:
        return described_batch("sequences", patch_starts(step) * patch_size)

    def objective(step: int) -> Mapping[str, Tensor]:
        draws = generator(seed, STAGE, "step", step)
        starts = patch_starts(step)
        patches = tokens.windows(starts * patch_size, section.context_tokens).unflatten(-1, (-1, patch_size))
        hidden_states = model(inputs(patches, starts, draws)).flatten(0, 1)
        posterior = latents.posterior((starts[:, None] + torch.arange(1, context + 1)).flatten())
        loss = model.head.loss(
            hidden_states, posterior, model.head.training_draws(len(hidden_states), head, draws), head
        )
        seen["hidden_states"] = hidden_states[:OBSERVED_POSITIONS].detach()
        return {"loss": loss.total, **loss.terms}

    @torch.no_grad()
    def observe() -> Mapping[str, float]:
        noise = model.head.sampling_draws((len(seen["hidden_states"]),), generator(seed, STAGE, "observed"))
        samples = model.head.sample(seen["hidden_states"], noise)
        return {"manifold_distance": float(manifold_distance(autoencoder, samples).mean())}

    tokens_per_step = section.batch_sequences * section.context_tokens
    train(
        model,
        objective,
        section,
        params.runtime,
        "calm",
        log,
        tokens_per_step,
        observe,
        checkpoints=checkpoints,
        batch_of=batch_of,
    )
    return model


@torch.no_grad()
def manifold_distance(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Root mean square, a dimension, between latents [..., latent] and the encoding of what they decode to, [...]."""
    nearest = autoencoder.encode(autoencoder.decode(latents)).mean
    return (latents - nearest).square().mean(dim=-1).sqrt()
