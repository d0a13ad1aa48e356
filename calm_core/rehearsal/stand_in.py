"""A tokenizer of any size from a sliver of text, in the place of one that the user may not have."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from calm_core.tokens.tokenizer import train_tokenizer

TRAINED_ENTRIES = 4096
"""Entries that are trained; more would leave the sliver with few tokens."""


def stand_in_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocabulary_size`` entries: some are trained on ``texts``, the others never used."""
    trained = json.loads(train_tokenizer(texts, min(vocabulary_size, TRAINED_ENTRIES)).to_str())
    vocabulary = trained["model"]["vocab"]
    # No merge makes them, so no text holds them.
    vocabulary |= {f"<unused-{number}>": number for number in range(len(vocabulary), vocabulary_size)}
    return Tokenizer.from_str(json.dumps(trained))
