"""Whether BrierLM ranks models as their likelihood does: over checkpoints of a training (paper, section 4)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl


class Correlation(NamedTuple):
    """Pearson's of the values, Spearman's of their ranks, both in [-1, 1]; None if a side never varies."""

    pearson: float | None
    spearman: float | None


def correlation(first: list[float], second: list[float]) -> Correlation:
    """Correlations of two lists of equal length, two values at least."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return Correlation(None, None)
    frame = pl.DataFrame({"first": first, "second": second})
    pearson, spearman = (
        frame.select(pl.corr("first", "second", method=method)).item() for method in ("pearson", "spearman")
    )
    return Correlation(pearson, spearman)


def pooled_correlation(runs: Sequence[dict[str, Any]], score: str, measure: str) -> Correlation:
    """Of ``score`` and ``measure`` of the checkpoints of several trainings together, the "checkpoints" of each run."""
    rows = [row for run in runs for row in run["checkpoints"]]
    return correlation([row[score] for row in rows], [row[measure] for row in rows])
