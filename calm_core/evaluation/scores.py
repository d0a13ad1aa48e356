"""The scores of one trained model, as two files: sums by place for whoever compares, and a summary for people.

A position knows what stands before it in its block and no more, so a score is one of its place and of its context: each
says the length of its blocks, and beside it stand the scores by eighth of a block and at shorter contexts.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from calm_core.evaluation.brier import by_document, tokens_before, with_groups
from calm_core.evaluation.intervals import BrierLM, estimate_brierlm
from calm_core.storage.atomic import write_bytes
from calm_core.storage.json_io import read_json, write_json
from calm_core.tokens.blocks import MAX_TOKENS, EvaluationBlocks

PARTS_OF_CONTEXT = (4, 2)
"""The trained context is divided by each for a shorter one."""

FEWER_TOKENS = 4
"""A shorter context is evaluated on so many times fewer tokens than the trained one."""


class Scores(NamedTuple):
    """What is known of one trained model."""

    places: pl.DataFrame
    """Sums of Brier scores as ``brier.per_document`` gives them, for each ``context_tokens``."""
    summary: dict[str, Any]
    """Plain JSON."""

    @property
    def documents(self) -> pl.DataFrame:
        """Sums of Brier scores by document, at the trained context."""
        return by_document(_at_trained_context(self.places))


def score_places(
    score: Callable[[EvaluationBlocks], pl.DataFrame],
    blocks: EvaluationBlocks,
    patch_size: int,
    split: str,
    groups: torch.Tensor,
    resamples: int,
    generator: torch.Generator,
) -> Scores:
    """BrierLM of one model on ``blocks``, which are cut from ``split``, and by place.

    Intervals are over ``groups`` [documents] int64, which group each document of the split is of.
    ``score`` gives the frame of any blocks, as ``brier.per_document`` does.
    """
    every = [*_shorter(blocks, patch_size), blocks]
    context = pl.lit(0, pl.Int64).alias("context_tokens")
    frames = [with_groups(score(one), groups).select(context + one.context, pl.all()) for one in every]
    places = pl.concat(frames)
    whole = estimate_brierlm([by_document(frames[-1])], resamples, generator)
    found = {
        **whole._asdict(),
        "split": split,
        "context_tokens": blocks.context,
        "stride_tokens": blocks.context,  # blocks do not overlap
        "blocks": len(blocks.starts),
        **estimate_by_place([places], whole, resamples, generator),
    }
    return Scores(places, found)


def estimate_by_place(
    seeds: Sequence[pl.DataFrame], whole: BrierLM, resamples: int, generator: torch.Generator
) -> dict[str, list[dict[str, Any]]]:
    """BrierLM of one model by eighth of a block of the trained context, and by context, with intervals.

    With few positions Brier-4 of a weak model is chance, and BrierLM with it; Brier-1, among ``brier``, is not.

    ``seeds`` are the ``Scores.places`` of the model, trained under one seed or several; ``whole`` is its score at the
    trained context, all places together.
    """

    def described(place: dict[str, Any], score: BrierLM) -> dict[str, Any]:
        return {
            **place,
            "brierlm": score.brierlm,
            "brierlm_ci95": score.brierlm_ci95,
            "brier": score.brier,
            "positions": score.positions,
        }

    def of(place: dict[str, Any], frames: Sequence[pl.DataFrame]) -> dict[str, Any]:
        return described(place, estimate_brierlm([by_document(frame) for frame in frames], resamples, generator))

    trained = [_at_trained_context(frame) for frame in seeds]
    context = int(trained[0]["context_tokens"][0])
    eighths, contexts = pl.col("eighth"), pl.col("context_tokens")
    shorter = sorted(set(seeds[0]["context_tokens"]) - {context})
    return {
        "by_position": [
            of({"tokens_before": tokens_before(part, context)}, [frame.filter(eighths == part) for frame in trained])
            for part in sorted(set(trained[0]["eighth"]))
        ],
        "by_context": [
            *(
                of({"context_tokens": length}, [frame.filter(contexts == length) for frame in seeds])
                for length in shorter
            ),
            described({"context_tokens": context}, whole),
        ],
    }


def write_scores(path: Path, scores: Scores) -> None:
    """Write ``path``.parquet and ``path``.json."""
    content = io.BytesIO()
    scores.places.write_parquet(content)
    write_bytes(path.with_suffix(".parquet"), content.getvalue())
    write_json(path.with_suffix(".json"), scores.summary)


def read_scores(path: Path) -> Scores:
    """What ``write_scores`` wrote."""
    summary = read_json(path.with_suffix(".json"))  # first: it says how to make what is missing
    with path.with_suffix(".parquet").open("rb") as file:  # polars takes no name that is not UTF-8
        return Scores(pl.read_parquet(file), summary)


def mean_of_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``summaries``, one a seed, say together: means of numbers, also in lists and mappings, the rest as it is.

    Intervals (``_ci95``) are left out: the mean of intervals is none. Of one seed nothing changes.
    """
    if len(summaries) == 1:
        return summaries[0]
    first = summaries[0]
    return {key: _mean([one[key] for one in summaries]) for key in first if not key.endswith("_ci95")}


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return mean_of_seeds(values)
    if isinstance(first, list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return sum(values) / len(values) if isinstance(first, float) else first


def _shorter(blocks: EvaluationBlocks, patch_size: int) -> list[EvaluationBlocks]:
    """Blocks of shorter contexts, from the shortest on: of whole patches, two at least, some of fewer tokens."""
    contexts = [blocks.context // part // patch_size * patch_size for part in PARTS_OF_CONTEXT]
    return [
        replace(
            blocks,
            context=context,
            batch=blocks.batch * (blocks.context // context),
            limit=max(blocks.limit // FEWER_TOKENS, context + MAX_TOKENS),
        )
        for context in sorted({context for context in contexts if context >= 2 * patch_size})
    ]


def _at_trained_context(places: pl.DataFrame) -> pl.DataFrame:
    """The rows at the longest context, which is that of the training."""
    return places.filter(pl.col("context_tokens") == pl.col("context_tokens").max())
