"""Shares of n-grams against plain sets and searches in Python, standard errors against the spread of many draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_core.evaluation.diversity import COPIED_TOKENS, copied_shares, distinct_share, mean_over_prompts
from calm_core.tokens.document_marks import DocumentMarks
from calm_core.tokens.shards import TokenStream
from tests.calm_core.known_models import Text

BEGIN, END = 4, 5
"""Tokens around documents."""
ENDED, BEGUN = DocumentMarks(after=(END,)), DocumentMarks(before=(BEGIN,))


def ngrams(tokens: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]


def distinct(sets: list[list[list[int]]], length: int) -> float:
    """Distinct-n, averaged over sets of continuations."""
    shares = []
    for continuations in sets:
        found = [one for tokens in continuations for one in ngrams(tokens, length)]
        shares.append(len(set(found)) / len(found))
    return float(np.mean(shares))


def jackknife(without: list[float]) -> float:
    spread = np.array(without) - np.mean(without)
    return float(np.sqrt((len(without) - 1) / len(without) * (spread**2).sum()))


def without(sets: list[list[list[int]]], prompt: int) -> list[list[list[int]]]:
    return [continuations[:prompt] + continuations[prompt + 1 :] for continuations in sets]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 7, 9), (3, 30, 5)])
def test_distinct_ngrams_are_those_of_sets(shape: tuple[int, int, int], length: int) -> None:
    token_ids = torch.randint(3, shape, generator=torch.Generator().manual_seed(length))
    token_ids[:, 1] = token_ids[:, 0]  # a text that says what another says
    sets = token_ids.tolist()
    found = distinct_share(token_ids, length)
    assert found.share == pytest.approx(distinct(sets, length), rel=1e-12)
    each = [distinct(without(sets, prompt), length) for prompt in range(shape[1])]
    assert found.standard_error == pytest.approx(jackknife(each), abs=1e-12)


def test_the_error_of_distinct_ngrams_is_their_spread() -> None:
    """Texts that differ in how much they repeat themselves: two of equal words are not two independent draws."""
    draws = torch.Generator().manual_seed(0)

    def texts() -> Tensor:
        vocabulary = torch.randint(2, 60, (1, 40, 1), generator=draws)
        return (torch.rand(2, 40, 12, generator=draws) * vocabulary).long()

    found = [distinct_share(texts(), 2) for _ in range(150)]
    spread = float(np.std([one.share for one in found]))
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.2)


def test_the_error_of_a_mean() -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.0]])
    means, errors = mean_over_prompts(values)
    assert means == [0.5, 0.0]
    assert errors == pytest.approx([np.std([1, 0, 0.5, 0.5], ddof=1) / 2, 0])
    each = [float(np.delete(values[:, 0].numpy(), prompt).mean()) for prompt in range(4)]
    assert errors[0] == pytest.approx(jackknife(each))


def stream(folder: Path, text: Text) -> TokenStream:
    text.write(folder, "train", END + 1, documents_a_shard=7)
    return TokenStream(folder, "train")


@pytest.mark.parametrize("marks", [ENDED, BEGUN, DocumentMarks((BEGIN,), (END,))])
def test_copies_are_those_of_a_search(marks: DocumentMarks, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 40, size=25)
    documents = [[*marks.before, *draws.integers(2, size=length).tolist(), *marks.after] for length in lengths]
    # One set of generated tokens, some of them marks of documents; and one that is cut out of the training text.
    mark = (marks.before or marks.after)[0]
    generated = torch.from_numpy(draws.choice([0, 1, mark], p=[0.47, 0.47, 0.06], size=(2, 20, 17)))
    joined = Text(documents).stream
    cut = torch.tensor([joined[start : start + 17] for start in range(0, 300, 15)])[None]

    def counts(tokens: list[int]) -> tuple[int, int]:
        whole = [
            one
            for one in ngrams(tokens, COPIED_TOKENS)
            if not {*one[:-1]} & {*marks.after} and not {*one[1:]} & {*marks.before}
        ]
        copied = [one for one in whole if any(one in ngrams(document, COPIED_TOKENS) for document in documents)]
        return len(copied), len(whole)

    for found, text in zip(
        copied_shares([generated, cut], stream(tmp_path, Text(documents)), marks), (generated, cut), strict=True
    ):
        of_prompts = np.array([[counts(tokens) for tokens in of_set] for of_set in text.tolist()]).sum(axis=0)
        copied, whole = of_prompts.sum(axis=0)
        assert found.share == pytest.approx(copied / whole, rel=1e-12)
        each = [(copied - part) / (whole - total) for part, total in of_prompts]
        assert found.standard_error == pytest.approx(jackknife(each), abs=1e-12)
        assert copied > 0
        assert copied < whole or text is cut
        assert (copied == whole) == (text is cut)


def test_texts_without_any_ngram_so_long(tmp_path: Path) -> None:
    training = stream(tmp_path, Text([[0, 1, END], [0] * 9 + [END]]))
    ends = torch.full((1, 3, 20), END)
    one = ends.clone()
    one[0, 1, :9] = 0
    found = copied_shares([ends, one], training, ENDED)
    assert found == [(None, None), (1.0, None)]
