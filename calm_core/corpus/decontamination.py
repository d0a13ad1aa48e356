"""Decontamination: which held-out documents training has mostly seen, counted exactly, and the splits without them.

A document is mostly seen if more than half of its 8-grams of tokens occur anywhere in the training split, each for
itself and wherever it stands there. That is no similarity of two documents, which MinHash estimates: a paragraph
inside a longer text, or sentences from several, leave every pair unlike (docs/method.md has the figures).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calm_core.tokens.ngrams import ngram_counts, occurring, split_hashes
from calm_core.tokens.shards import TokenStream, TokenWriter

NGRAM_TOKENS = 8
MOST_SEEN = 0.5
"""Largest share of its n-grams that a held-out document may have in training."""


class Seen(NamedTuple):
    """Of each document of a held-out split, how many n-grams there are and how many occur in training."""

    ngrams: np.ndarray
    """[documents] int64, one at least."""
    in_training: np.ndarray
    """[documents] int64."""

    @property
    def mostly(self) -> np.ndarray:
        """Which documents training has mostly seen, [documents] bool."""
        return self.in_training > MOST_SEEN * self.ngrams

    def of(self, documents: np.ndarray) -> "Seen":
        """The same of ``documents`` alone, [documents] bool."""
        return Seen(self.ngrams[documents], self.in_training[documents])

    @property
    def ngram_share(self) -> float:
        """Share of all n-grams, repeated ones counted again, that occur in training; 0 if there are none."""
        return float(self.in_training.sum() / max(1, self.ngrams.sum()))

    @property
    def document_share(self) -> float:
        """Share of documents that training has mostly seen; 0 if there are none."""
        return float(self.mostly.sum() / max(1, len(self.ngrams)))


def seen_in_training(held_out: Mapping[str, TokenStream], train: TokenStream) -> dict[str, Seen]:
    """For each of the splits ``held_out`` what ``train`` has of it; reads training once.

    Memory is a multiple of the held-out splits', whatever the size of training.
    """
    hashes = {split: np.concatenate(list(split_hashes(tokens, NGRAM_TOKENS))) for split, tokens in held_out.items()}
    wanted = np.unique(np.concatenate(list(hashes.values())))
    found = occurring(wanted, train, NGRAM_TOKENS, "decontaminate")
    seen = {}
    for split, of_split in hashes.items():
        counts = ngram_counts(held_out[split].document_ends.numpy(), NGRAM_TOKENS)
        # Every document has an n-gram, so none of these ranges is empty.
        in_training = np.add.reduceat(found[np.searchsorted(wanted, of_split)], np.cumsum(counts) - counts, dtype=int)
        seen[split] = Seen(counts, in_training)
    return seen


def write_documents(tokens: TokenStream, documents: np.ndarray, writer: TokenWriter) -> list[Path]:
    """Write those of ``tokens`` that ``documents`` [documents] bool names, shard by shard; returns the new shards."""
    first = 0
    for token_ids, ends in tokens.shards():
        lengths, kept = np.diff(ends, prepend=0), documents[first : first + len(ends)]
        writer.write_documents(token_ids[np.repeat(kept, lengths)], lengths[kept])
        first += len(ends)
    writer.flush()
    return writer.paths


def describe_seen(before: Seen, after: Seen) -> dict[str, float | int]:
    """Figures of a split, as the description of the tokens has them: before and after documents were dropped."""
    return {
        "ngram_tokens": NGRAM_TOKENS,
        "ngram_share_before": before.ngram_share,
        "ngram_share_after": after.ngram_share,
        "document_share_before": before.document_share,
        "document_share_after": after.document_share,
        "documents_dropped": len(before.ngrams) - len(after.ngrams),
    }
