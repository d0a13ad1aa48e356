"""BrierLM over held-out text, of models whose scores at every place of it are known exactly."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch

from calm_core.errors import CalmError
from calm_core.evaluation.brier import SCORES, brier_from_samples, by_document, tokens_before
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.evaluation.continuations import calm_continuations, transformer_brier
from calm_core.runtime.randomness import generator
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from tests.calm_core.known_models import (
    COIN,
    Expected,
    Moments,
    Paths,
    Place,
    Text,
    bigram_calm,
    bigram_transformer,
    chain_text,
    coin_calm,
    expected,
    history_transformer,
    moments_of_probabilities,
    moments_of_sampling,
    paths_of_bigrams,
    paths_of_patches,
    paths_of_tokens,
    places,
    walk,
)

SIZE = 4
LENGTHS = [5, 1, 23, 2, 40, 7, 12, 3, 61, 1, 1, 18, 9, 30, 4, 27]
"""Of the documents: some longer than a block of 12, some of a single token, in which few targets start or none."""
CONTEXT, BATCH = 12, 3
TABLE = np.array([[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.1], [0.2, 0.3, 0.1, 0.4], [0.45, 0.05, 0.45, 0.05]])

SURE = {
    1: [[[1], [1]], [[2], [2]], [[3], [3]], [[0], [0]]],
    2: [[[1, 2]] * 2, [[2, 3]] * 2, [[3, 0]] * 2, [[0, 1]] * 2],
    4: [[[1, 2, 3, 0]] * 2, [[2, 3, 0, 1]] * 2, [[3, 0, 1, 2]] * 2, [[0, 1, 2, 3]] * 2],
}
"""Next patches by K and last token: the tokens count up."""


def counting(follow: float, lengths: Sequence[int] = LENGTHS) -> Text:
    """Text whose tokens mostly count up."""
    return chain_text(np.roll(np.eye(SIZE), 1, axis=1), lengths, follow, seed=5)


@pytest.fixture()
def blocks(tmp_path: Path) -> Callable[..., EvaluationBlocks]:
    """Writes a text as shards and cuts it into blocks."""

    def cut(
        text: Text, context: int = CONTEXT, batch: int = BATCH, limit: int = 10**6, seed: int = 0
    ) -> EvaluationBlocks:
        text.write(tmp_path, "validation", SIZE, documents_a_shard=3)
        return EvaluationBlocks(TokenStream(tmp_path, "validation"), context, batch, limit, seed)

    return cut


def by_place(
    paths: Callable[[Sequence[int]], Paths], moments: Callable[[Paths, Sequence[int], int], Moments], samples: int
) -> Callable[[Place], Moments]:
    """Moments at a place, computed once for each last token and what follows it."""
    computed = cache(lambda last, following: moments(paths([last]), following, samples))
    return lambda place: computed(place.history[-1], place.following)


def assert_expected(table: pl.DataFrame, wanted: Expected, standard_errors: float = 4.5) -> None:
    """Documents and positions are equal; sums lie within standard errors, exactly where there is no variance."""
    table = by_document(table)
    assert table["document"].to_list() == wanted.document
    assert table["positions"].to_list() == wanted.positions
    difference = np.abs(table.select(SCORES).to_numpy() - wanted.mean)
    allowed = standard_errors * np.sqrt(np.maximum(wanted.variance, 0)) + 1e-5 * np.array(wanted.positions)[:, None]
    assert np.all(difference <= allowed), (difference / allowed).max()
    # Over all documents together the bound is tighter.
    assert np.all(np.abs(difference_of_totals(table, wanted)) <= 4 * np.sqrt(wanted.variance.sum(axis=0)) + 1e-3)


def difference_of_totals(table: pl.DataFrame, wanted: Expected) -> np.ndarray:
    return np.asarray((table.select(SCORES).to_numpy() - wanted.mean).sum(axis=0))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("choices", [1, 2, 4])
def test_a_transformer_without_variance(blocks: Callable[..., EvaluationBlocks], patch_size: int, choices: int) -> None:
    table = walk(SIZE, choices)
    text = chain_text(table, LENGTHS, 0.7, seed=choices)
    found = evaluate_transformer(bigram_transformer(table), blocks(text), patch_size, samples=1)
    moments = by_place(paths_of_bigrams(table), moments_of_probabilities, 1)
    wanted = expected(places(text, CONTEXT, patch_size), moments)
    assert wanted.variance.max() < 1e-5
    assert_expected(found, wanted)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_transformer_of_any_bigrams(blocks: Callable[..., EvaluationBlocks], patch_size: int, samples: int) -> None:
    text = chain_text(TABLE, LENGTHS * 3, 0.7, seed=3)
    found = evaluate_transformer(bigram_transformer(TABLE), blocks(text), patch_size, samples)
    moments = by_place(paths_of_bigrams(TABLE), moments_of_probabilities, samples)
    assert_expected(found, expected(places(text, CONTEXT, patch_size), moments))


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_token_head_of_any_bigrams(blocks: Callable[..., EvaluationBlocks], patch_size: int, samples: int) -> None:
    text = chain_text(TABLE, LENGTHS * 3, 0.7, seed=3)
    found = evaluate_calm(bigram_calm(TABLE, patch_size), None, blocks(text), samples)
    moments = by_place(paths_of_bigrams(TABLE), moments_of_probabilities, samples)
    assert_expected(found, expected(places(text, CONTEXT, patch_size), moments))


@pytest.mark.parametrize("patch_size", [1, 3, 4])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_token_head_without_variance(blocks: Callable[..., EvaluationBlocks], patch_size: int, choices: int) -> None:
    table = walk(SIZE, choices)
    text = chain_text(table, LENGTHS, 0.7, seed=choices)
    found = evaluate_calm(bigram_calm(table, patch_size), None, blocks(text), samples=1)
    wanted = expected(places(text, CONTEXT, patch_size), by_place(paths_of_bigrams(table), moments_of_probabilities, 1))
    assert wanted.variance.max() < 1e-5
    assert_expected(found, wanted)


@pytest.mark.parametrize("every", [5, 12])
def test_a_transformer_is_asked_at_whole_patches_of_a_block(
    blocks: Callable[..., EvaluationBlocks], every: int
) -> None:
    table = walk(SIZE, 2)
    text = chain_text(table, LENGTHS, 0.7, seed=4)
    found = evaluate_transformer(bigram_transformer(table), blocks(text), every, samples=1)
    asked = places(text, CONTEXT, every)
    assert len(asked) == (sum(LENGTHS) - 4) // CONTEXT * (CONTEXT // every)
    assert_expected(found, expected(asked, by_place(paths_of_bigrams(table), moments_of_probabilities, 1)))


@pytest.mark.parametrize("inputs", ["tokens", "latents"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("samples", [2, 3])
def test_a_calm_without_randomness(
    blocks: Callable[..., EvaluationBlocks], patch_size: int, samples: int, inputs: Literal["tokens", "latents"]
) -> None:
    text = counting(0.8)
    found = evaluate_calm(*coin_calm(SURE[patch_size], inputs), blocks(text), samples)
    moments = by_place(paths_of_patches(SURE[patch_size]), moments_of_sampling, samples)
    wanted = expected(places(text, CONTEXT, patch_size), moments)
    assert np.all(wanted.variance == 0)
    assert_expected(found, wanted)


@pytest.mark.parametrize("inputs", ["tokens", "latents"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("samples", [2, 3])
def test_a_calm_that_tosses_a_coin(
    blocks: Callable[..., EvaluationBlocks], patch_size: int, samples: int, inputs: Literal["tokens", "latents"]
) -> None:
    text = counting(0.6, LENGTHS * 3)
    found = evaluate_calm(*coin_calm(COIN[patch_size], inputs), blocks(text), samples)
    moments = by_place(paths_of_patches(COIN[patch_size]), moments_of_sampling, samples)
    assert_expected(found, expected(places(text, CONTEXT, patch_size), moments))


def test_a_model_sees_its_block_up_to_the_place(blocks: Callable[..., EvaluationBlocks]) -> None:
    model, after = history_transformer(TABLE, 2.0)
    text = chain_text(TABLE, LENGTHS, 0.7, seed=6)
    paths = paths_of_tokens(after)
    for patch_size in (2, 4):
        asked = places(text, CONTEXT, patch_size)
        wanted = expected(asked, lambda place: moments_of_probabilities(paths(place.history), place.following, 2))
        assert_expected(evaluate_transformer(model, blocks(text), patch_size, 2), wanted)
    surprise = [-math.log(after(place.history)[place.following[0]]) for place in places(text, CONTEXT, 1)]
    assert cross_entropy(model, blocks(text)) == pytest.approx(np.mean(surprise), rel=1e-5)


@pytest.mark.parametrize(("context", "patch_size"), [(12, 1), (16, 2), (20, 4), (8, 4), (4, 2)])
def test_scores_are_those_of_their_eighth(
    blocks: Callable[..., EvaluationBlocks], context: int, patch_size: int
) -> None:
    # As many tokens before a position as there are, in a model whose score depends on the last token alone.
    text = counting(0.7)
    found = evaluate_calm(*coin_calm(SURE[patch_size]), blocks(text, context), 2)
    asked = places(text, context, patch_size)
    assert set(found["eighth"]) == {
        eighth for eighth in range(8) if any(eighth < 8 * len(place.history) / context <= eighth + 1 for place in asked)
    }
    for (eighth,), table in found.partition_by("eighth", as_dict=True).items():
        low, high = tokens_before(int(eighth), context)
        assert 8 * (low - 1) / context <= eighth < 8 * low / context
        assert 8 * high / context <= eighth + 1 < 8 * (high + 1) / context
        there = [place for place in asked if low <= len(place.history) <= high]
        moments = by_place(paths_of_patches(SURE[patch_size]), moments_of_sampling, 2)
        assert_expected(table, expected(there, moments))


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("limit", [50, 100, 10**6])
def test_cross_entropy(blocks: Callable[..., EvaluationBlocks], batch: int, limit: int) -> None:
    text = chain_text(TABLE, LENGTHS, 0.5, seed=7)
    surprise = [-math.log(TABLE[place.history[-1], place.following[0]]) for place in places(text, CONTEXT, 1, limit)]
    found = cross_entropy(bigram_transformer(TABLE), blocks(text, batch=batch, limit=limit))
    assert found == pytest.approx(np.mean(surprise), rel=1e-5)


@pytest.mark.parametrize(
    ("limit", "whole_blocks"), [(15, 0), (16, 1), (27, 1), (28, 2), (99, 7), (100, 8), (244, 20), (10**6, 20)]
)
def test_the_limit_leaves_whole_blocks(blocks: Callable[..., EvaluationBlocks], limit: int, whole_blocks: int) -> None:
    text, table = counting(0.7), walk(SIZE, 2)
    assert sum(LENGTHS) == 244
    some = blocks(text, limit=limit)
    if not whole_blocks:
        with pytest.raises(CalmError, match="15 tokens, too few for one block of 12 and 4 more"):
            evaluate_transformer(bigram_transformer(table), some, 4, 1)
        return
    of_calm = evaluate_calm(*coin_calm(SURE[4]), some, 2)
    of_transformer = evaluate_transformer(bigram_transformer(table), some, 4, 1)
    asked = places(text, CONTEXT, 4, limit)
    assert of_calm["positions"].sum() == of_transformer["positions"].sum() == len(asked) == 3 * whole_blocks
    assert_expected(of_calm, expected(asked, by_place(paths_of_patches(SURE[4]), moments_of_sampling, 2)))
    moments = by_place(paths_of_bigrams(table), moments_of_probabilities, 1)
    assert_expected(of_transformer, expected(asked, moments))


def test_batches_change_nothing_where_nothing_is_sampled(blocks: Callable[..., EvaluationBlocks]) -> None:
    text = counting(0.8)
    calm = coin_calm(SURE[2])
    tables = [evaluate_calm(*calm, blocks(text, batch=batch), 2) for batch in (1, 4, 100)]
    for first, second in itertools.pairwise(tables):
        assert first.equals(second)


def test_a_document_scores_the_targets_that_start_in_it(blocks: Callable[..., EvaluationBlocks]) -> None:
    # K 2 and blocks of 4: targets start at 2, 4, 6, 8, 10 and 12, and documents end at 2, 3, 7 and 18.
    documents = [[1, 2], [3], [0, 1, 2, 3], [0, 1, 2, 3, 3, 3, 0, 1, 2, 3, 0]]
    found = by_document(evaluate_calm(*coin_calm(SURE[2]), blocks(Text(documents), context=4), 2))
    # The model counts up. The text does so up to position 10; there is a 3 at 10, 11 and 12, and then it goes on.
    assert found["document"].to_list() == [1, 2, 3]
    assert found["positions"].to_list() == [1, 2, 3]
    assert found.select(SCORES).rows() == [(1, 1, 1, 1), (2, 2, 2, 2), (1, -1, -1, -3)]


def test_batches_are_sampled_independently(blocks: Callable[..., EvaluationBlocks]) -> None:
    # Documents are blocks, all the same, each a batch of its own: only what is drawn tells them apart.
    text = Text([[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]] * 20)
    some = blocks(text, batch=1)
    of_calm = evaluate_calm(*coin_calm(COIN[1]), some, 2)
    of_transformer = evaluate_transformer(bigram_transformer(TABLE), some, 1, 1)
    for found in map(by_document, (of_calm, of_transformer)):
        assert len(set(found["brier_4"][1:-1].to_list())) > 5


def test_the_seed_is_that_of_the_blocks(blocks: Callable[..., EvaluationBlocks]) -> None:
    text = counting(0.7)
    transformer, calm = bigram_transformer(TABLE), coin_calm(COIN[2])
    for score in (
        lambda some: evaluate_transformer(transformer, some, 2, 1),
        lambda some: evaluate_calm(*calm, some, 2),
    ):
        first, again, other = (score(blocks(text, seed=seed)) for seed in (0, 0, 1))
        assert first.equals(again)
        assert not first.equals(other)


def test_random_numbers_are_those_of_the_stage_the_model_and_the_batch(blocks: Callable[..., EvaluationBlocks]) -> None:
    some = blocks(counting(0.7), batch=10**6)
    [(_, token_ids)] = some.batches(following=4)
    transformer, (calm, autoencoder) = bigram_transformer(TABLE), coin_calm(COIN[2])
    patches, targets = token_ids[:, :CONTEXT].unflatten(-1, (-1, 2)), token_ids[:, 2:].unfold(1, 4, 2)
    draws = [generator(0, "evaluate_brierlm", name, 0) for name in ("Transformer", "CALM")]
    by_transformer = transformer_brier(transformer, token_ids, torch.arange(1, CONTEXT, 2), 1, draws[0])
    by_calm = brier_from_samples(calm_continuations(calm, autoencoder, patches, 4, 2, draws[1]), targets)
    for found, scores in (
        (evaluate_transformer(transformer, some, 2, 1), by_transformer),
        (evaluate_calm(calm, autoencoder, some, 2), by_calm),
    ):
        assert found.select(SCORES).sum().row(0) == pytest.approx(scores.double().sum(dim=(0, 1)).tolist())
