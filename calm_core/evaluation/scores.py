"""The scores of one trained model, as two files: sums by document for whoever compares, and a summary for people."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.storage.atomic import write_bytes
from calm_core.storage.json_io import read_json, write_json
from calm_core.tokens.blocks import EvaluationBlocks


class Scores(NamedTuple):
    """What is known of one trained model."""

    documents: pl.DataFrame
    """Sums of Brier scores, as ``brier.per_document`` gives them."""
    summary: dict[str, Any]
    """Plain JSON."""


def summary(
    documents: pl.DataFrame, split: str, blocks: EvaluationBlocks, resamples: int, generator: torch.Generator
) -> dict[str, Any]:
    """BrierLM of ``documents``, one model's on ``blocks``, with an interval over documents, and what it depends on."""
    score = estimate_brierlm([documents], resamples, generator)
    # A score is one of its block length: positions have half of it before them on average.
    return {
        **score._asdict(),
        "split": split,
        "context_tokens": blocks.context,
        "stride_tokens": blocks.context,  # blocks do not overlap
        "blocks": len(blocks.starts),
    }


def write_scores(path: Path, scores: Scores) -> None:
    """Write ``path``.parquet and ``path``.json."""
    content = io.BytesIO()
    scores.documents.write_parquet(content)
    write_bytes(path.with_suffix(".parquet"), content.getvalue())
    write_json(path.with_suffix(".json"), scores.summary)


def read_scores(path: Path) -> Scores:
    """What ``write_scores`` wrote."""
    with path.with_suffix(".parquet").open("rb") as file:  # polars takes no name that is not UTF-8
        return Scores(pl.read_parquet(file), read_json(path.with_suffix(".json")))


def mean_of_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``summaries``, one a seed, say together: means of numbers, also in lists and mappings, the rest as it is.

    Intervals (``_ci95``) are left out: the mean of intervals is none.
    """
    first = summaries[0]
    return {key: _mean([one[key] for one in summaries]) for key in first if not key.endswith("_ci95")}


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return mean_of_seeds(values)
    if isinstance(first, list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return sum(values) / len(values) if isinstance(first, float) else first
