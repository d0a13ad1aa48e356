"""Training the baseline: next-token cross entropy on blocks of the token stream."""

from collections.abc import Mapping

import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import NORM_EPSILON
from calm_core.params import LanguageModelParams, Params, TransformerParams
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices, described_batch
from calm_core.training.loop import train
from calm_core.training.objective import CPU, Loss, on_device, starting_model
from calm_core.training.run import Run, spread_steps
from calm_core.training.shape import shape_from
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

STAGE = "train_transformer"


def transformer_config(section: LanguageModelParams, vocabulary_size: int) -> TransformerConfig:
    """The shape that params.yaml asks for."""
    return TransformerConfig(vocabulary_size, shape_from(BackboneConfig, section, norm_epsilon=NORM_EPSILON))


class TransformerObjective:
    """Blocks of the training split ``tokens``, each with the token that follows it, and next-token cross entropy.

    ``initial`` becomes the trained model itself; without it that is a fresh one of ``vocabulary_size``.

    Raises:
        CalmError: the split is shorter than one context and the token that follows it.
    """

    name = "transformer"

    def __init__(
        self,
        section: TransformerParams,
        tokens: TokenStream,
        vocabulary_size: int,
        seed: int,
        initial: Transformer | None = None,
    ) -> None:
        self._tokens, self._seed = tokens, seed
        self.rows, self.tokens_per_row = section.batch_sequences, section.context_tokens
        # The last token of a block needs the one after it as its target.
        self._blocks = (len(tokens) - 1) // self.tokens_per_row
        if self._blocks < 1:
            raise CalmError(
                f"the training split has {len(tokens)} tokens, fewer than transformer.context_tokens "
                f"{self.tokens_per_row} and one more; use more text or a shorter context"
            )
        config = transformer_config(section, vocabulary_size)
        self.model = starting_model(initial, lambda: Transformer(config), generator(seed, STAGE, "weights"))

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> Tensor:
        """Token ids [rows, context + 1] int64: inputs, and one step later targets."""
        # One token more than the context: ``next_token_loss`` shifts.
        starts = self._sequence_starts(step)[rows.start : rows.stop]
        return on_device(self._tokens.windows(starts, self.tokens_per_row + 1), device)

    def loss(self, batch: Tensor) -> Loss:
        return Loss(next_token_loss(self.model, batch))

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        return {}

    def describe_batch(self, step: int) -> str:
        return described_batch("sequences", self._sequence_starts(step))

    def _sequence_starts(self, step: int) -> Tensor:
        # Blocks are numbered; in tokens they are one context apart and do not overlap.
        return batch_indices(step, self.rows, self._blocks, self._seed, STAGE) * self.tokens_per_row


def train_transformer(
    params: Params,
    tokens: TokenStream,
    vocabulary_size: int,
    run: Run | None = None,
    initial: Transformer | None = None,
) -> Transformer:
    """Train a Transformer on the training split ``tokens``, ``initial`` itself if it is given.

    Errors as ``TransformerObjective`` and ``train``.

    A training that resumes has the weights of its checkpoint, whatever it began with, and does not hand models before
    that to ``run.keep`` again.
    """
    objective = TransformerObjective(params.transformer, tokens, vocabulary_size, params.seed, initial)
    return train(objective, params.transformer, params.runtime, run)


def checkpoint_steps(section: TransformerParams) -> frozenset[int]:
    """After which steps the models are kept that BrierLM and cross entropy are compared on."""
    return spread_steps(section.known_steps, section.checkpoints)
