"""Training and measuring the autoencoder on patches of the corpus.

Each step takes patches from random positions of the token stream, at any alignment, so that the code also
covers patches in which one document ends and the next begins: the language model meets them too.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, AutoencoderDraws, autoencoder_loss, draw
from calm_core.params import AutoencoderParams, Params
from calm_core.runtime.device import device_of
from calm_core.runtime.randomness import StepStreams, generator
from calm_core.runtime.threads import side_by_side
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import described_batch
from calm_core.training.loop import train
from calm_core.training.objective import CPU, Loss, on_device
from calm_core.training.run import Run
from calm_core.training.shape import shape_from

STAGE = "train_autoencoder"
LATENT_NOISE_STD = 0.3
"""The noise that the paper asks the code to withstand (section 2)."""

EVALUATION_BATCH = 4096

MEASURED_TOKENS = 1 << 20
"""Held-out tokens that are rebuilt, at most: a share of 0.999 of so many is known to 0.00003."""

DRAWN_TOGETHER = 256
"""Patches of a batch whose noise comes from one stream: a process draws little more than its own."""


def autoencoder_config(section: AutoencoderParams, vocabulary_size: int) -> AutoencoderConfig:
    """The shape that params.yaml asks for."""
    return shape_from(AutoencoderConfig, section, vocabulary_size=vocabulary_size)


class PatchBatch(NamedTuple):
    """Token ids [patches, K] int64, and the draws of a step over them."""

    token_ids: Tensor
    draws: AutoencoderDraws


class AutoencoderObjective:
    """Patches from random positions of the training split ``tokens``, and the autoencoder's loss of them."""

    name = "autoencoder"

    def __init__(self, section: AutoencoderParams, tokens: TokenStream, vocabulary_size: int, seed: int) -> None:
        self._section, self._tokens, self._seed = section, tokens, seed
        self.model = Autoencoder(autoencoder_config(section, vocabulary_size))
        self.model.initialise(generator(seed, STAGE, "weights"))
        self.rows, self.tokens_per_row = section.batch_patches, section.patch_size

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> PatchBatch:
        # Positions of the whole batch, of which a process takes its rows: the batch is the same for any number of
        # processes.
        starts = self._patch_starts(step)[rows.start : rows.stop]
        token_ids = on_device(self._tokens.windows(starts, self._section.patch_size), device)
        return PatchBatch(token_ids, self._draws(step, rows, device))

    def loss(self, batch: PatchBatch) -> Loss:
        section = self._section
        loss = autoencoder_loss(
            self.model,
            batch.token_ids,
            batch.draws,
            kl_weight=section.kl_weight,
            kl_clamp=section.kl_clamp,
            token_dropout=section.token_dropout,
            latent_dropout=section.latent_dropout,
        )
        return Loss(loss.total, {"cross_entropy": loss.cross_entropy, "kl": loss.kl})

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        return {}

    def describe_batch(self, step: int) -> str:
        return described_batch("patches", self._patch_starts(step))

    def _draws(self, step: int, rows: range, device: torch.device) -> AutoencoderDraws:
        """Those of patches ``rows`` of a batch, from a stream for each ``DRAWN_TOGETHER`` patches of it."""
        # Whole blocks that the rows touch; what lies before and after the rows is cut off again.
        blocks = range(rows.start // DRAWN_TOGETHER, -(-rows.stop // DRAWN_TOGETHER))
        streams = StepStreams(self._seed, STAGE, step, blocks, device)
        drawn = draw(self.model.config, DRAWN_TOGETHER, streams)
        skipped = rows.start - blocks.start * DRAWN_TOGETHER
        return AutoencoderDraws(*(values[skipped : skipped + len(rows)] for values in drawn))

    def _patch_starts(self, step: int) -> Tensor:
        """Positions at any alignment, so that the code covers patches that a document's end falls into."""
        draws = generator(self._seed, STAGE, "step", step)
        # The upper end is exclusive: the last patch starts K tokens before the end.
        return torch.randint(len(self._tokens) - self.tokens_per_row + 1, (self.rows,), generator=draws)


def train_autoencoder(params: Params, tokens: TokenStream, vocabulary_size: int, run: Run | None = None) -> Autoencoder:
    """Train an autoencoder on the training split ``tokens``; errors as ``training.loop.train``."""
    objective = AutoencoderObjective(params.autoencoder, tokens, vocabulary_size, params.seed)
    return train(objective, params.autoencoder, params.runtime, run)


class Reconstruction(NamedTuple):
    """Share of tokens that come back, from the posterior mean and from the mean under latent noise of std 0.3."""

    token_accuracy: float
    token_accuracy_noisy: float
    posterior_std: float
    tokens: int


def reconstruction(model: Autoencoder, tokens: TokenStream, seed: int) -> Reconstruction:
    """Measure ``model`` on the whole patches of the held-out split ``tokens``, in float32, where the model is.

    At most the first ``MEASURED_TOKENS`` of it are looked at.
    """
    patch_size, device = model.config.patch_size, device_of(model)
    # Aligned at the split's beginning, as CALM's patches are.
    patches = tokens.slice(0, min(len(tokens), MEASURED_TOKENS) // patch_size * patch_size).view(-1, patch_size)
    draws = generator(seed, STAGE, "latent noise", device=device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in patches.split(EVALUATION_BATCH):
            yield part, torch.randn(len(part), model.config.latent_size, generator=draws, device=device)

    def measure(drawn: tuple[Tensor, Tensor]) -> tuple[int, int, float]:
        batch, noise = drawn[0].to(device), drawn[1]
        posterior = model.encode(batch)
        noisy = posterior.mean + LATENT_NOISE_STD * noise
        right, right_noisy = ((model.decode(latents) == batch).sum() for latents in (posterior.mean, noisy))
        return int(right), int(right_noisy), float(posterior.log_std.exp().mean(dim=-1).sum())

    # Sums in Python's float64: a float32 sum over a large split would drift.
    right, right_noisy, total_std = map(sum, zip(*side_by_side(measure, batches(), device, model), strict=True))
    count = patches.numel()
    return Reconstruction(right / count, right_noisy / count, total_std / len(patches), count)
