"""Text of any length for what must not depend on the text: made-up words, as unevenly frequent as real ones."""

import torch

from calm_core.runtime.randomness import generator

WORDS, VOCABULARY = 100, 20_000
"""Words of a document, and words there are."""


def synthetic_documents(number: int) -> list[str]:
    """``number`` documents, the word of rank r drawn with a probability in proportion to 1 / r (Zipf's law)."""
    draws = generator(0, "scaling", "text")
    lengths = torch.randint(2, 11, (VOCABULARY,), generator=draws)
    letters = torch.randint(ord("a"), ord("z") + 1, (VOCABULARY, 10), generator=draws)
    words = ["".join(map(chr, row[:length])) for row, length in zip(letters.tolist(), lengths.tolist(), strict=True)]
    weights = 1 / torch.arange(1, VOCABULARY + 1)
    chosen = torch.multinomial(weights, number * WORDS, replacement=True, generator=draws).view(number, WORDS)
    return [" ".join(words[word] for word in row) for row in chosen.tolist()]
