"""N-grams as hashes, against sets of tuples in plain Python."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.tokens import ngrams
from calm_core.tokens.ngrams import ngram_counts, ngram_hashes, occurring
from calm_core.tokens.shards import TokenStream, TokenWriter

Documents = list[list[int]]

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


def tuples(documents: Documents, length: int) -> list[tuple[int, ...]]:
    """The n-grams of ``documents`` in their order; a shorter document is one, marked as no part of a longer."""
    grams: list[tuple[int, ...]] = []
    for document in documents:
        if len(document) < length:
            grams.append((-1, *document))
        grams += [tuple(document[start : start + length]) for start in range(len(document) - length + 1)]
    return grams


def joined(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    token_ids = np.array([token for document in documents for token in document], np.uint16)
    return token_ids, np.cumsum([len(document) for document in documents], dtype=np.int64)


@pytest.fixture(params=[3, 7, 1 << 19])
def piece(request: pytest.FixtureRequest) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "PIECE_TOKENS", request.param)
        yield request.param


@given(documents=DOCUMENTS, length=st.integers(1, 9), piece=st.sampled_from([1, 3, 7, 64]))
def test_hashes_are_equal_where_the_ngrams_are(documents: Documents, length: int, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "PIECE_TOKENS", piece)
        hashes = ngram_hashes(*joined(documents), length).tolist()
    expected = tuples(documents, length)
    assert len(hashes) == len(expected)
    # One hash for each n-gram, and one n-gram for each hash.
    assert len(set(zip(hashes, expected, strict=True))) == len(set(hashes)) == len(set(expected))
    counts = [len(tuples([document], length)) for document in documents]
    assert ngram_counts(joined(documents)[1], length).tolist() == counts


def write(folder: Path, split: str, documents: Documents, documents_a_shard: int = 5) -> TokenStream:
    writer = TokenWriter(folder, split, 1000)
    for number, document in enumerate(documents, 1):
        writer.write(document)
        if number % documents_a_shard == 0:
            writer.flush()
    writer.flush()
    return TokenStream(folder, split)


def random_documents(number: int, tokens: int, seed: int) -> Documents:
    draws = np.random.default_rng(seed)
    return [draws.integers(tokens, size=draws.integers(1, 30)).tolist() for _ in range(number)]


@pytest.mark.parametrize("length", [1, 3, 8])
def test_what_a_split_holds(tmp_path: Path, piece: int, length: int) -> None:
    documents = random_documents(60, 4, seed=0)
    stream = write(tmp_path, "train", documents)
    asked = random_documents(40, 4, seed=1) + documents[:5] + [document[2:-2] for document in documents if document[4:]]
    wanted = ngram_hashes(*joined(asked), length)
    distinct, places = np.unique(wanted, return_inverse=True)
    there = set(tuples(documents, length))
    expected = [gram in there for gram in tuples(asked, length)]
    assert occurring(distinct, stream, length, "looking")[places].tolist() == expected
    assert sum(expected) > 0
    assert length == 1 or sum(expected) < len(expected)


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    stream = write(tmp_path, "train", [[1, 2, 3]])
    assert occurring(np.empty(0, np.uint64), stream, 2, "looking").tolist() == []


def test_neighbouring_ids_share_no_hash() -> None:
    # Hashes of plain ids would meet where a step up at one place is a step down at the next.
    token_ids = np.arange(1 << 17, dtype=np.int32)
    assert len(np.unique(ngram_hashes(token_ids, np.array([1 << 17]), 2))) == (1 << 17) - 1
    pairs = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1)
    ends = np.arange(2, len(pairs) + 1, 2)
    assert len(np.unique(ngram_hashes(pairs, ends, 2))) == 300 * 300
