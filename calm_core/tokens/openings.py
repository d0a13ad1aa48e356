"""What stands before a prompt: the end of another document, as before the start of every document in training.

A patch may begin in one document and end in the next, and so a model has seen starts behind such ends alone: behind
anything else, as a run of end-of-text tokens, it guesses (docs/method.md has the figures).
"""

import numpy as np

from calm_core.tokens.shards import TokenStream

MOST_DOCUMENTS = 1 << 20
"""Documents that are looked at, from the first on."""


def commonest_document_end(tokens: TokenStream, length: int) -> list[int]:
    """The ``length`` token ids with which most documents of a split end, marks after a document included.

    Of several that are equally common, the first in the order of their ids.
    """
    ends = tokens.document_ends[:MOST_DOCUMENTS]
    windows = tokens.windows(ends[ends >= length] - length, length).numpy()
    found, counts = np.unique(windows, axis=0, return_counts=True)
    commonest: list[int] = found[counts.argmax()].tolist()
    return commonest
