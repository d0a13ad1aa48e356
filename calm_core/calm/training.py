"""Training CALM on the encoded corpus (paper, section 3), or with a token head on the tokens alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.calm.token_training import TokenHeadObjective, whole_blocks
from calm_core.latents.online import OnlineLatents
from calm_core.latents.shards import LatentCorpus
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import NORM_EPSILON
from calm_core.params import CalmParams, Params
from calm_core.runtime.randomness import StepStreams, generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices, described_batch
from calm_core.training.loop import train
from calm_core.training.objective import CPU, Loss, on_device, starting_model
from calm_core.training.run import Run, spread_steps
from calm_core.training.shape import shape_from

STAGE = "train_calm"

OBSERVED_POSITIONS = 128
"""Positions of a training batch at which the distance from the manifold is observed, a sample each."""


def calm_config(section: CalmParams, autoencoder: AutoencoderConfig) -> CalmConfig:
    """The shape that params.yaml asks for, on the latents of ``autoencoder``; a token head has its patches alone."""
    return CalmConfig(
        vocabulary_size=autoencoder.vocabulary_size,
        patch_size=autoencoder.patch_size,
        latent_size=autoencoder.latent_size if section.needs_autoencoder else section.hidden_size,
        backbone=shape_from(BackboneConfig, section, norm_epsilon=NORM_EPSILON),
        head=_head_config(section),
        input=section.input,
    )


def _head_config(section: CalmParams) -> AnyHeadConfig:
    if section.head == "tokens":
        return TokenHeadConfig(section.token_hidden_size, section.token_intermediate_size, section.token_layers)
    if section.head == "diffusion":
        return DiffusionHeadConfig(section.head_blocks, sampling_steps=section.diffusion_steps, start_is_noise=True)
    if section.head == "flow":
        return FlowHeadConfig(section.head_blocks, section.flow_solver, section.flow_steps)
    return EnergyHeadConfig(section.head_blocks, section.noise_size)


def head_objective(section: CalmParams, autoencoder: Autoencoder) -> HeadObjective:
    """What params.yaml asks the head to be trained for."""
    spaces = (autoencoder.hidden_states,) if section.decoder_score else ()
    return HeadObjective(section.samples, section.target_samples, section.alpha, spaces)


class SequenceBatch(NamedTuple):
    """Sequences of P patches, and the posterior of the patch that follows each, flattened to [rows * P, latent]."""

    inputs: Tensor
    """Token ids [rows, P, K] int64, or latents [rows, P, latent]."""
    posterior: Posterior
    draws: Any
    """The head's, over rows * P positions."""


class CalmObjective:
    """Sequences of the encoded training split, and the head's loss of each next patch.

    ``tokens`` and ``latents``, encoded before or online, are those of the split. ``autoencoder`` is frozen and on the
    device of the training. ``initial`` becomes the trained model itself; without it that is a fresh one.

    Raises:
        CalmError: the split is shorter than one context and the patch that follows it.
    """

    name = "calm"

    def __init__(
        self,
        section: CalmParams,
        tokens: TokenStream,
        latents: LatentCorpus | OnlineLatents,
        autoencoder: Autoencoder,
        seed: int,
        initial: Calm | None = None,
    ) -> None:
        self._section, self._tokens, self._latents, self._seed = section, tokens, latents, seed
        # Not a submodule of the model: it is neither trained, sharded nor saved with it.
        self._autoencoder, self._head_objective = autoencoder, head_objective(section, autoencoder)
        self._patch_size = autoencoder.config.patch_size
        self._context = section.context_tokens // self._patch_size
        self._blocks = whole_blocks(section, tokens, len(latents), self._patch_size)
        config = calm_config(section, autoencoder.config)
        self.model = starting_model(initial, lambda: Calm(config), generator(seed, STAGE, "weights"))
        self.rows, self.tokens_per_row = section.batch_sequences, section.context_tokens

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> SequenceBatch:
        starts = self._patch_starts(step)[rows.start : rows.stop]
        # A stream a row gives the same numbers to whichever process or micro-batch has the row.
        streams = StepStreams(self._seed, STAGE, step, rows, device)
        # The target of a position is the patch after it.
        following = (starts[:, None] + torch.arange(1, self._context + 1)).flatten()
        return SequenceBatch(
            self._inputs(starts, streams, device),
            on_device(self._latents.posterior(following), device),
            self.model.latent_head.training_draws(self._context, self._head_objective, streams),
        )

    def loss(self, batch: SequenceBatch) -> Loss:
        hidden_states = self.model(batch.inputs).flatten(0, 1)
        loss = self.model.latent_head.loss(hidden_states, batch.posterior, batch.draws, self._head_objective)
        return Loss(loss.total, loss.terms, hidden_states[:OBSERVED_POSITIONS].detach())

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        """How far samples after the first positions of a batch, ``features``, lie from the autoencoder's manifold."""
        assert features is not None
        # The key has no step: each point of the curve sees the same noise, so that what moves it is the model.
        noise = self.model.latent_head.sampling_draws((len(features),), generator(self._seed, STAGE, "observed"))
        samples = self.model.latent_head.sample(features, noise.to(features.device))
        return {"manifold_distance": float(manifold_distance(self._autoencoder, samples).mean())}

    def describe_batch(self, step: int) -> str:
        return described_batch("sequences", self._patch_starts(step) * self._patch_size)

    def _patch_starts(self, step: int) -> Tensor:
        return batch_indices(step, self.rows, self._blocks, self._seed, STAGE) * self._context

    def _inputs(self, starts: Tensor, streams: StepStreams, device: torch.device) -> Tensor:
        if self._section.input == "tokens":
            token_ids = on_device(self._tokens.windows(starts * self._patch_size, self.tokens_per_row), device)
            return token_ids.unflatten(-1, (-1, self._patch_size))
        posterior = on_device(self._latents.posterior(starts[:, None] + torch.arange(self._context)), device)
        # Fed by a sample, as in generation, where the model reads the latents that its head has sampled.
        return posterior.sample(streams.normal("inputs", *posterior.mean.shape[1:]))


def train_calm(
    params: Params,
    tokens: TokenStream,
    latents: LatentCorpus | OnlineLatents,
    autoencoder: Autoencoder,
    run: Run | None = None,
    initial: Calm | None = None,
) -> Calm:
    """Train a CALM on the training split, ``initial`` itself if it is given; errors as ``CalmObjective`` and ``train``.

    ``autoencoder`` is moved to the device of the training; a token head takes the patch size from it and no more. A
    training that resumes has the weights of its checkpoint, whatever it began with, and does not hand models before
    that to ``run.keep`` again.
    """
    run = run or Run()
    if not params.calm.needs_autoencoder:
        config = calm_config(params.calm, autoencoder.config)
        of_tokens = TokenHeadObjective(params.calm, config, tokens, params.seed, STAGE, initial)
        return train(of_tokens, params.calm, params.runtime, run)
    # In place, since the objective's space is a method of this very module.
    autoencoder.to(run.processes.device)
    objective = CalmObjective(params.calm, tokens, latents, autoencoder, params.seed, initial)
    return train(objective, params.calm, params.runtime, run)


def checkpoint_steps(section: CalmParams) -> frozenset[int]:
    """After which steps the models are kept that BrierLM and the bound of the likelihood are compared on."""
    return spread_steps(section.steps, section.checkpoints)


@torch.no_grad()
def manifold_distance(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Root mean square, a dimension, between latents [..., latent] and the encoding of what they decode to, [...]."""
    nearest = autoencoder.encode(autoencoder.decode(latents)).mean
    return (latents - nearest).square().mean(dim=-1).sqrt()
