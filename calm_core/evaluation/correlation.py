"""Whether BrierLM ranks models as cross entropy does: over checkpoints of one training (paper, section 4)."""

from typing import NamedTuple

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
