"""How a held-out split is cut for BrierLM: blocks of the models' context, each with the four tokens that follow."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.tokens.shards import TokenStream

MAX_TOKENS = 4
"""Tokens that BrierLM asks for after a position: Brier-4 is the longest."""


def require_block(tokens: int, context: int, text: str = "the held-out text", why: str = "", remedy: str = "") -> int:
    """How many blocks of ``context`` tokens a split of ``tokens`` holds; raises CalmError if there is none.

    Its message calls the split ``text``, and gives ``why`` and a ``remedy`` beside those that there always are.
    """
    blocks = (tokens - MAX_TOKENS) // context
    if blocks < 1:
        raise CalmError(
            f"{text} has {tokens} tokens, too few for one block of {context} and {MAX_TOKENS} more{why}; "
            f"use more text, {remedy or 'a larger corpus.test_percent'} or a shorter context"
        )
    return blocks


@dataclass(frozen=True)
class EvaluationBlocks:
    """What a model is evaluated on: whole blocks, drawn evenly from a split, some of them at a time.

    From the start alone they would be of the first documents, which in the default corpus are the first services of the
    alphabet.
    """

    tokens: TokenStream
    context: int
    """Tokens of a block."""
    batch: int
    """Blocks that go through a model together; the last batch may have fewer."""
    limit: int
    """Tokens of the split to look at, at most."""
    seed: int
    """Seed of all that is sampled on these blocks."""

    @property
    def starts(self) -> Tensor:
        """Position in the split of each block's first token, [blocks] int64; raises CalmError if there is no block."""
        there = require_block(len(self.tokens), self.context)
        asked = require_block(min(len(self.tokens), self.limit), self.context)
        return torch.arange(asked) * there // asked * self.context

    def batches(self, following: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Starts [batch] of the blocks of each batch, and their token ids [batch, context + following] int64.

        ``following`` tokens, 4 or fewer, are read after each block: the targets of its last positions.
        """
        for starts in self.starts.split(self.batch):
            yield starts, self.tokens.windows(starts, self.context + following)

    def documents(self, starts: Tensor, offsets: Tensor) -> Tensor:
        """The document of the split at each of ``offsets`` from each of ``starts``, [starts * offsets] int64."""
        places = (starts[:, None] + offsets).flatten()
        # document_ends are exclusive: what begins at an end belongs to the next document, hence right=True.
        return torch.searchsorted(self.tokens.document_ends, places, right=True)
