"""Decontamination: which held-out documents training has mostly seen, counted exactly, and the splits without them.

A document is mostly seen if more than half of its 8-grams of tokens occur anywhere in the training split, each for
itself and wherever it stands there. That is no similarity of two documents, which MinHash estimates: a paragraph
inside a longer text, or sentences from several, leave every pair unlike (docs/method.md has the figures).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calm_core.tokens.ngrams import ngram_counts, ngram_hashes, occurring
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
    # Shards of held-out splits are small: each ends where one of training does. They are hashed twice, which takes less
    # memory than to keep the hash of every n-gram.
    distinct = [
        np.unique(ngram_hashes(token_ids, ends, NGRAM_TOKENS))
        for tokens in held_out.values()
        for token_ids, ends in tokens.shards()
    ]
    wanted = np.unique(np.concatenate(distinct))
    del distinct
    found = occurring(wanted, train, NGRAM_TOKENS, "decontaminate")
    return {split: _counted(tokens, wanted, found) for split, tokens in held_out.items()}


def _counted(tokens: TokenStream, wanted: np.ndarray, found: np.ndarray) -> Seen:
    """What of a split was ``found`` [n-grams] bool among ``wanted``, its and perhaps other splits' hashes in order."""
    ngrams, in_training = [], []
    for token_ids, ends in tokens.shards():
        counts = ngram_counts(ends, NGRAM_TOKENS)
        there = found[np.searchsorted(wanted, ngram_hashes(token_ids, ends, NGRAM_TOKENS))]
        ngrams.append(counts)
        # Every document has an n-gram, so none of these ranges is empty.
        in_training.append(np.add.reduceat(there, np.cumsum(counts) - counts, dtype=int))
    return Seen(np.concatenate(ngrams), np.concatenate(in_training))


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
