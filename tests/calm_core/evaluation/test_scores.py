"""Scores by place, of a model whose score is known at every place, and what is said of several seeds."""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from calm_core.evaluation.brier import SCORES
from calm_core.evaluation.brierlm import evaluate_calm
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.evaluation.scores import (
    Scores,
    estimate_by_place,
    mean_of_seeds,
    read_scores,
    score_places,
    write_scores,
)
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from tests.calm_core.known_models import chain_text, coin_calm, expected, moments_of_sampling, paths_of_patches, places

SIZE = 4
SURE = {2: [[[1, 2]] * 2, [[2, 3]] * 2, [[3, 0]] * 2, [[0, 1]] * 2], 4: [[[1, 2, 3, 0]] * 2] * 4}
TEXT = chain_text(np.roll(np.eye(SIZE), 1, axis=1), [90, 60, 200, 40, 1, 300, 17], 0.9, seed=1)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scores_of(folder: Path, context: int, patch_size: int, limit: int = 10**6) -> Scores:
    TEXT.write(folder, "test", SIZE, documents_a_shard=3)
    blocks = EvaluationBlocks(TokenStream(folder, "test"), context, 3, limit, 0)
    score = partial(evaluate_calm, *coin_calm(SURE[patch_size]), samples=2)
    return score_places(score, blocks, patch_size, "test", torch.arange(len(TEXT.documents)) // 2, 100, draws())


def brierlm_at(context: int, patch_size: int, limit: int | None, low: int, high: int) -> tuple[float, int]:
    """BrierLM where ``low`` to ``high`` tokens of a block stand before, and how many such places there are."""
    asked = [place for place in places(TEXT, context, patch_size, limit) if low <= len(place.history) <= high]
    paths = paths_of_patches(SURE[patch_size])
    wanted = expected(asked, lambda place: moments_of_sampling(paths(place.history), place.following, 2))
    brier = np.maximum(wanted.mean.sum(axis=0) / len(asked), 0)
    return float(100 * np.prod(brier) ** 0.25), len(asked)


@pytest.mark.parametrize("limit", [10**6, 500])
def test_by_position_and_by_context(tmp_path: Path, limit: int) -> None:
    found = scores_of(tmp_path, 32, 2, limit).summary
    assert list(found) == [
        "brierlm", "brierlm_ci95", "brier", "positions", "documents", "groups", "split", "context_tokens",
        "stride_tokens", "blocks", "by_position", "by_context",
    ]  # fmt: skip
    assert (found["split"], found["context_tokens"], found["stride_tokens"]) == ("test", 32, 32)
    assert [row["tokens_before"] for row in found["by_position"]] == [[4 * n + 1, 4 * n + 4] for n in range(8)]
    for row in found["by_position"]:
        wanted, count = brierlm_at(32, 2, limit, *row["tokens_before"])
        assert row["brierlm"] == pytest.approx(wanted, rel=1e-6)
        assert row["positions"] == count == 2 * found["blocks"]
        assert row["brierlm"] == pytest.approx(100 * np.prod(np.maximum(row["brier"], 0)) ** 0.25)
        low, high = row["brierlm_ci95"]
        assert low < wanted < high
    assert [row["context_tokens"] for row in found["by_context"]] == [8, 16, 32]
    for row in found["by_context"]:
        context = row["context_tokens"]
        wanted, count = brierlm_at(context, 2, limit if context == 32 else limit // 4, 1, context)
        assert row["brierlm"] == pytest.approx(wanted, rel=1e-6)
        assert row["positions"] == count
    # Said once, not drawn again.
    assert found["by_context"][-1]["brierlm_ci95"] == found["brierlm_ci95"]
    assert found["groups"] == -(-found["documents"] // 2)


@pytest.mark.parametrize(
    ("context", "patch_size", "contexts"),
    [(4, 2, [4]), (8, 2, [4, 8]), (12, 2, [6, 12]), (20, 4, [8, 20]), (8, 4, [8]), (44, 4, [8, 20, 44])],
)
def test_shorter_contexts_are_of_whole_patches(
    tmp_path: Path, context: int, patch_size: int, contexts: list[int]
) -> None:
    # Of a limit whose quarter holds no block there still is one.
    found = scores_of(tmp_path, context, patch_size, context + 4).summary
    assert [row["context_tokens"] for row in found["by_context"]] == contexts
    assert [row["positions"] for row in found["by_context"]] == [length // patch_size for length in contexts]
    eighths = {-(-8 * before // context) for before in range(patch_size, context + 1, patch_size)}
    assert len(found["by_position"]) == len(eighths)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = scores_of(tmp_path, 16, 2)
    write_scores(tmp_path / "scores/calm", found)
    read = read_scores(tmp_path / "scores/calm")
    assert read.places.equals(found.places)
    assert read.summary == found.summary
    assert read.documents["positions"].sum() == found.summary["positions"]
    assert read.documents["document"].is_unique().all()


def test_places_of_several_seeds(tmp_path: Path) -> None:
    first = scores_of(tmp_path, 16, 2).places
    better = first.with_columns(pl.col(SCORES) * 0.5 + pl.col("positions") * 0.5)
    whole = estimate_brierlm([Scores(one, {}).documents for one in (first, better)], 100, draws())
    found = estimate_by_place([first, better], whole, 100, draws())
    assert found["by_context"][-1]["brierlm_ci95"] == whole.brierlm_ci95  # said once, not drawn again
    alone = [
        estimate_by_place([one], estimate_brierlm([Scores(one, {}).documents], 100, draws()), 100, draws())
        for one in (first, better)
    ]
    for kind in ("by_position", "by_context"):
        for row, one, other in zip(found[kind], alone[0][kind], alone[1][kind], strict=True):
            assert row["brierlm"] == pytest.approx((one["brierlm"] + other["brierlm"]) / 2)
            assert row["positions"] == one["positions"]
            # Two seeds so far apart leave the mean uncertain.
            assert row["brierlm_ci95"][1] > other["brierlm_ci95"][1]


def test_the_mean_of_seeds_leaves_intervals_out_where_it_would_have_to_average_them() -> None:
    one = {"a": 1.0, "a_ci95": [0.5, 1.5], "rows": [{"n": 1, "b": 2.0, "b_ci95": [1.0, 3.0]}], "split": "test"}
    other = {"a": 2.0, "a_ci95": [1.5, 2.5], "rows": [{"n": 1, "b": 4.0, "b_ci95": [3.0, 5.0]}], "split": "test"}
    assert mean_of_seeds([one]) == one
    assert mean_of_seeds([one, other]) == {"a": 1.5, "rows": [{"n": 1, "b": 3.0}], "split": "test"}
