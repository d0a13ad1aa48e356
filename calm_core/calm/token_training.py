"""Training CALM with a token head (``token_head``): the likelihood of each next patch of the token stream."""

from collections.abc import Mapping

import torch
from torch import Tensor

from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead
from calm_core.errors import CalmError
from calm_core.params import CalmParams
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices, described_batch
from calm_core.training.objective import CPU, Loss, on_device, starting_model


def whole_blocks(section: CalmParams, tokens: TokenStream, patches: int, patch_size: int) -> int:
    """How many contexts of ``section`` the ``patches`` of the split ``tokens`` make, each followed by one patch more.

    Raises:
        CalmError: not one.
    """
    # The last position of a block needs one more patch as its target.
    blocks = (patches - 1) // (section.context_tokens // patch_size)
    if blocks < 1:
        raise CalmError(
            f"the training split has {len(tokens)} tokens, fewer than calm.context_tokens "
            f"{section.context_tokens} and a patch; use more text or a shorter context"
        )
    return blocks


class TokenHeadObjective:
    """Sequences of the training split ``tokens``, each with the patch that follows it, and their cross entropy.

    ``stage`` keys the draws, with ``seed``. ``initial`` becomes the trained model itself; without it that is a fresh
    one of shape ``config``.

    Raises:
        CalmError: the split is shorter than one context and the patch that follows it.
    """

    name = "calm"

    def __init__(
        self,
        section: CalmParams,
        config: CalmConfig,
        tokens: TokenStream,
        seed: int,
        stage: str,
        initial: Calm | None = None,
    ) -> None:
        self._tokens, self._seed, self._stage, self._patch_size = tokens, seed, stage, config.patch_size
        self.rows, self.tokens_per_row = section.batch_sequences, section.context_tokens
        self._blocks = whole_blocks(section, tokens, len(tokens) // config.patch_size, config.patch_size)
        self.model = starting_model(initial, lambda: Calm(config), generator(seed, stage, "weights"))

    def batch(self, step: int, rows: range, device: torch.device = CPU) -> Tensor:
        """Token ids of sequences of P patches and one more, [rows, P + 1, K] int64."""
        starts = self._starts(step)[rows.start : rows.stop]
        token_ids = self._tokens.windows(starts, self.tokens_per_row + self._patch_size)
        return on_device(token_ids.unflatten(-1, (-1, self._patch_size)), device)

    def loss(self, batch: Tensor) -> Loss:
        assert isinstance(self.model.head, TokenHead)
        read, following = batch[:, :-1], batch[:, 1:]
        return Loss(self.model.head.loss(self.model(read), read, following))

    def observe(self, features: Tensor | None) -> Mapping[str, float]:
        return {}

    def describe_batch(self, step: int) -> str:
        return described_batch("sequences", self._starts(step))

    def _starts(self, step: int) -> Tensor:
        return batch_indices(step, self.rows, self._blocks, self._seed, self._stage) * self.tokens_per_row
