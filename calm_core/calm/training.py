"""Training CALM on the encoded corpus (paper, section 3)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.latents.shards import LatentCorpus
from calm_core.nn.backbone import BackboneConfig
from calm_core.params import CalmParams, Params
from calm_core.runtime.process_group import ALONE, Processes
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices, described_batch
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.loop import train
from calm_core.training.shape import shape_from

STAGE = "train_calm"

OBSERVED_POSITIONS = 128
"""Positions of a training batch at which the distance from the manifold is observed, a sample each."""


def calm_config(section: CalmParams, autoencoder: AutoencoderConfig) -> CalmConfig:
    """The shape that params.yaml asks for, on the latents of ``autoencoder``."""
    return CalmConfig(
        vocabulary_size=autoencoder.vocabulary_size,
        patch_size=autoencoder.patch_size,
        latent_size=autoencoder.latent_size,
        backbone=shape_from(BackboneConfig, section),
        head=_head_config(section),
        input=section.input,
    )


def _head_config(section: CalmParams) -> AnyHeadConfig:
    if section.head == "diffusion":
        return DiffusionHeadConfig(section.head_blocks, sampling_steps=section.diffusion_steps, start_is_noise=True)
    if section.head == "flow":
        return FlowHeadConfig(section.head_blocks, section.flow_solver, section.flow_steps)
    return EnergyHeadConfig(section.head_blocks, section.noise_size)


def head_objective(section: CalmParams, autoencoder: Autoencoder) -> HeadObjective:
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
    processes: Processes = ALONE,
) -> Calm:
    """Train a CALM on the training split; ``log``, ``checkpoints`` and ``processes`` as in ``training.train``.

    ``autoencoder`` stays as it is, but for the device of ``processes``, where it is from now on.

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
    model = Calm(calm_config(section, autoencoder.config))
    model.initialise(generator(seed, STAGE, "weights"))
    autoencoder.to(processes.device)
    head = head_objective(section, autoencoder)
    seen: dict[int, Tensor] = {}

    def patch_starts(step: int) -> Tensor:
        return batch_indices(step, section.batch_sequences, blocks, seed, STAGE) * context

    def batch_of(step: int) -> str:
        return described_batch("sequences", patch_starts(step) * patch_size)

    def inputs(starts: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        if section.input == "tokens":
            return tokens.windows(starts * patch_size, section.context_tokens).unflatten(-1, (-1, patch_size))
        posterior = latents.posterior(starts[:, None] + torch.arange(context))
        noise = [torch.randn(posterior.mean.shape[1:], generator=one) for one in draws]
        return posterior.sample(torch.stack(noise))

    def objective(step: int, rows: range) -> Mapping[str, Tensor]:
        starts = patch_starts(step)[rows.start : rows.stop]
        draws = [generator(seed, STAGE, "step", step, row) for row in rows]
        hidden_states = model(inputs(starts, draws).to(processes.device)).flatten(0, 1)
        posterior = latents.posterior((starts[:, None] + torch.arange(1, context + 1)).flatten())
        head_draws = model.head.training_draws(context, head, generator(seed, STAGE, "step", step), draws)
        loss = model.head.loss(
            hidden_states,
            Posterior(*(part.to(processes.device) for part in posterior)),
            type(head_draws)(*(part.to(processes.device) for part in head_draws)),
            head,
        )
        if step not in seen:
            seen.clear()
            seen[step] = hidden_states[:OBSERVED_POSITIONS].detach()
        return {"loss": loss.total, **loss.terms}

    def observe() -> Mapping[str, float]:
        (hidden_states,) = seen.values()
        noise = model.head.sampling_draws((len(hidden_states),), generator(seed, STAGE, "observed"))
        samples = model.head.sample(hidden_states, noise.to(processes.device))
        return {"manifold_distance": float(manifold_distance(autoencoder, samples).mean())}

    return train(
        model,
        objective,
        section,
        params.runtime,
        "calm",
        log,
        section.batch_sequences,
        section.context_tokens,
        observe=observe,
        checkpoints=checkpoints,
        batch_of=batch_of,
        processes=processes,
    )


@torch.no_grad()
def manifold_distance(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Root mean square, a dimension, between latents [..., latent] and the encoding of what they decode to, [...]."""
    nearest = autoencoder.encode(autoencoder.decode(latents)).mean
    return (latents - nearest).square().mean(dim=-1).sqrt()
