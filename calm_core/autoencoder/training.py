"""Training and measuring the autoencoder on patches of the corpus.

Each step takes patches from random positions of the token stream, at any alignment, so that the code also
covers patches in which one document ends and the next begins: the language model meets them too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, AutoencoderDraws, autoencoder_loss, draw
from calm_core.params import AutoencoderParams, Params
from calm_core.runtime.process_group import ALONE, Processes
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import described_batch
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.loop import train
from calm_core.training.shape import shape_from

STAGE = "train_autoencoder"
LATENT_NOISE_STD = 0.3
"""The noise that the paper asks the code to withstand (section 2)."""

EVALUATION_BATCH = 4096

DRAWN_TOGETHER = 256
"""Patches of a batch whose noise comes from one generator: a process draws little more than its own."""


def autoencoder_config(section: AutoencoderParams, vocabulary_size: int) -> AutoencoderConfig:
    """The shape that params.yaml asks for."""
    return shape_from(AutoencoderConfig, section, vocabulary_size=vocabulary_size)


def train_autoencoder(
    params: Params,
    tokens: TokenStream,
    vocabulary_size: int,
    log: Callable[[int, Mapping[str, float]], None],
    checkpoints: CheckpointStore | None = None,
    processes: Processes = ALONE,
) -> Autoencoder:
    """Train an autoencoder on the training split ``tokens``; the other arguments as in ``training.train``."""
    section, seed = params.autoencoder, params.seed
    model = Autoencoder(autoencoder_config(section, vocabulary_size))
    model.initialise(generator(seed, STAGE, "weights"))

    def patch_starts(step: int) -> Tensor:
        draws = generator(seed, STAGE, "step", step)
        return torch.randint(len(tokens) - section.patch_size + 1, (section.batch_patches,), generator=draws)

    def batch_of(step: int) -> str:
        return described_batch("patches", patch_starts(step))

    def objective(step: int, rows: range) -> Mapping[str, Tensor]:
        token_ids = tokens.windows(patch_starts(step)[rows.start : rows.stop], section.patch_size)
        draws = _draws(model.config, rows, seed, step)
        loss = autoencoder_loss(
            model,
            token_ids.to(processes.device),
            AutoencoderDraws(*(draw.to(processes.device) for draw in draws)),
            kl_weight=section.kl_weight,
            kl_clamp=section.kl_clamp,
            token_dropout=section.token_dropout,
            latent_dropout=section.latent_dropout,
        )
        return {"loss": loss.total, "cross_entropy": loss.cross_entropy, "kl": loss.kl}

    return train(
        model,
        objective,
        section,
        params.runtime,
        "autoencoder",
        log,
        section.batch_patches,
        section.patch_size,
        checkpoints=checkpoints,
        batch_of=batch_of,
        processes=processes,
    )


def _draws(config: AutoencoderConfig, rows: range, seed: int, step: int) -> AutoencoderDraws:
    """Those of patches ``rows`` of a batch, from a generator for each ``DRAWN_TOGETHER`` patches of it."""
    first, last = rows.start // DRAWN_TOGETHER, -(-rows.stop // DRAWN_TOGETHER)
    blocks = [draw(config, DRAWN_TOGETHER, generator(seed, STAGE, "step", step, block)) for block in range(first, last)]
    skipped = rows.start - first * DRAWN_TOGETHER
    return AutoencoderDraws(*(torch.cat(parts)[skipped : skipped + len(rows)] for parts in zip(*blocks, strict=True)))


class Reconstruction(NamedTuple):
    """Share of tokens that come back, from the posterior mean and from the mean under latent noise of std 0.3."""

    token_accuracy: float
    token_accuracy_noisy: float
    posterior_std: float
    tokens: int


@torch.no_grad()
def reconstruction(model: Autoencoder, tokens: TokenStream, seed: int) -> Reconstruction:
    """Measure ``model`` on all whole patches of the held-out split ``tokens``, in float32."""
    patch_size = model.config.patch_size
    patches = tokens.slice(0, len(tokens) // patch_size * patch_size).view(-1, patch_size)
    noise = generator(seed, STAGE, "latent noise")
    right = right_noisy = 0
    total_std = 0.0
    for batch in patches.split(EVALUATION_BATCH):
        posterior = model.encode(batch)
        noisy = posterior.mean + LATENT_NOISE_STD * torch.randn(posterior.mean.shape, generator=noise)
        right += int((model.decode(posterior.mean) == batch).sum())
        right_noisy += int((model.decode(noisy) == batch).sum())
        total_std += float(posterior.log_std.exp().mean(dim=-1).sum())
    count = patches.numel()
    return Reconstruction(right / count, right_noisy / count, total_std / len(patches), count)
