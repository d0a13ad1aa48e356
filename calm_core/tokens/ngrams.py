"""N-grams of tokens as 64-bit hashes, and which of them a split holds: in memory of the n-grams asked for alone.

An n-gram lies within one document, whose marks are tokens like any other. A document that is shorter is one
n-gram as a whole, so that none is without: it occurs elsewhere only as another document of the same tokens.

Two n-grams share a hash with a probability of 2**-64: of 10**6 asked for and 10**10 looked through, none is likely to.
"""

from collections.abc import Iterator

import numpy as np

from calm_core.runtime.progress import progress
from calm_core.tokens.shards import TokenStream

PIECE_TOKENS = 1 << 16
"""Tokens that are hashed at once: half a megabyte of hashes, which stay in the processor's cache."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def ngram_counts(document_ends: np.ndarray, length: int) -> np.ndarray:
    """How many n-grams of ``length`` tokens each document has, [documents] int64: one at least.

    ``document_ends`` [documents]: position after each document's last token, the first document beginning at 0.
    """
    return np.maximum(1, np.diff(document_ends, prepend=0) - length + 1)


def ngram_hashes(token_ids: np.ndarray, document_ends: np.ndarray, length: int) -> np.ndarray:
    """A hash of every n-gram of ``length`` tokens, in the order of the text, [n-grams] uint64.

    ``token_ids`` [tokens]: documents one after the other; ``document_ends`` [documents]: the position after each.
    """
    return np.concatenate([np.empty(0, np.uint64), *_pieces(token_ids, document_ends, length)])


def occurring(wanted: np.ndarray, tokens: TokenStream, length: int, name: str) -> np.ndarray:
    """Which of ``wanted``, distinct hashes [n-grams] uint64 in rising order, the split holds, [n-grams] bool.

    Reads the split once; ``name`` is what its progress is called.
    """
    found = np.zeros(len(wanted), bool)
    if not len(wanted):
        return found
    # Most of a split's n-grams are not among those asked for, and a table of the first bits tells without a search:
    # between 8 and 16 places for each, so that some 1 in 12 others passes.
    bits = np.uint64(64 - len(wanted).bit_length() - 3)
    possible = np.zeros(1 << int(64 - bits), bool)
    possible[wanted >> bits] = True
    with progress(name, len(tokens), "tokens") as advance:
        for token_ids, document_ends in tokens.shards():
            without = len(token_ids)
            for hashes in _pieces(token_ids, document_ends, length):
                candidates = hashes[possible[hashes >> bits]]
                places = np.minimum(np.searchsorted(wanted, candidates), len(wanted) - 1)
                found[places[wanted[places] == candidates]] = True
                without -= len(hashes)
                advance(len(hashes))
            advance(without)  # tokens with which no n-gram begins
    return found


def _pieces(token_ids: np.ndarray, document_ends: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """``ngram_hashes``, of n-grams that begin in one piece of the text after the other."""
    lengths = np.diff(document_ends, prepend=0)
    # Documents that are one n-gram as a whole, and where they begin.
    short = np.flatnonzero(lengths < length)
    short_starts = (document_ends - lengths)[short]
    for start in range(0, len(token_ids), PIECE_TOKENS):
        size = min(PIECE_TOKENS, len(token_ids) - start)
        # N-grams run on into the next piece; none runs on behind the text.
        mixed = np.zeros(size + length - 1, np.uint64)
        following = token_ids[start : start + size + length - 1]
        mixed[: len(following)] = _mixed(following)
        here = slice(*np.searchsorted(short_starts, (start, start + size)))
        begins, shorter = short_starts[here] - start, lengths[short[here]]
        whole = np.empty(len(begins), np.uint64)
        # A polynomial in _FACTOR, of one token more at every turn.
        hashes = np.zeros(size, np.uint64)
        for tokens in range(1, length + 1):
            hashes *= _FACTOR
            hashes += mixed[tokens - 1 : tokens - 1 + size]
            of_length = shorter == tokens
            whole[of_length] = hashes[begins[of_length]]
        hashes[begins] = whole
        # Fewer than ``length`` tokens before the end of its document no n-gram begins, but for short documents.
        ends = document_ends[slice(*np.searchsorted(document_ends, (start + 1, start + size + length - 1)))] - start
        inside = np.ones(size, bool)
        for before in range(1, length):
            none = ends - before
            inside[none[(none >= 0) & (none < size)]] = False
        inside[begins] = True
        yield hashes[inside]


def _mixed(token_ids: np.ndarray) -> np.ndarray:
    """Token ids as uint64 of which every bit depends on every bit of the id (the finaliser of SplitMix64)."""
    values = (token_ids.astype(np.uint64) + np.uint64(1)) * _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
