"""The plot of quality and diversity over temperatures: a line a model, from the hottest text to the coldest."""

import math
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from calm_core.report.figures import NEUTRAL, STYLE, svg

DISTINCT = 2
"""The n of the distinct-n that is plotted: of these short texts longer n-grams nearly all differ at any temperature."""


def quality_against_diversity(diversity: dict[str, Any], models: dict[str, tuple[str, str]]) -> str:
    """Accuracy against distinct n-grams and against collisions, and copies of training text over temperatures.

    ``diversity`` is results/diversity.json; ``models`` maps its models to their title and colour. Bars: one standard
    error to both sides.
    """
    truth = diversity["truth"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
        for name, (title, colour) in models.items():
            rows = sorted(diversity[name].values(), key=lambda row: -float(row["temperature"]))
            temperatures = [(row["temperature"], 0.0) for row in rows]
            accuracy, collision = (
                [(row[term][0], row[f"{term}_standard_error"][0]) for row in rows] for term in ("accuracy", "collision")
            )
            distinct = [(row["distinct"][DISTINCT - 1], row["distinct_standard_error"][DISTINCT - 1]) for row in rows]
            copied = [_percent(row) for row in rows]
            for axes, xs, ys in zip(
                panels, (distinct, collision, temperatures), (accuracy, accuracy, copied), strict=True
            ):
                _line(axes, xs, ys, colour, title)
            for axes, xs in zip(panels[:2], (distinct, collision), strict=True):
                for number, ((x, _), (y, _), row) in enumerate(zip(xs, accuracy, rows, strict=True)):
                    # By turns below and above: neighbours may be close, and colder texts are mostly more accurate.
                    place = (5, 5 if number % 2 else -12)
                    axes.annotate(f"{row['temperature']:g}", (x, y), place, textcoords="offset points", color=colour)
        panels[0].axvline(truth["distinct"][DISTINCT - 1], color=NEUTRAL, linestyle="--", label="true text")
        panels[0].set(xlabel=f"distinct-{DISTINCT}", ylabel="accuracy of the next token")
        panels[0].set_title("Quality against distinct n-grams")
        # Where texts are drawn from the distribution that they are compared with, both terms are the same.
        panels[1].axline((0, 0), slope=1, color=NEUTRAL, linestyle="--", label="accuracy = collision")
        panels[1].set(xlabel="collision of two texts' next tokens", ylabel="accuracy of the next token")
        panels[1].set_title("BrierLM's two terms")
        panels[2].axhline(_percent(truth)[0], color=NEUTRAL, linestyle="--", label="true text")
        panels[2].set(xlabel="temperature", ylabel="8-grams of the training split, %")
        panels[2].set_title("Copies of training text")
        for axes in panels:
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8.5)
        for axes in panels[1:]:
            axes.set_xlim(left=0)
        return svg(figure)


Points = list[tuple[float, float]]
"""Values with their standard errors."""


def _line(axes: Axes, xs: Points, ys: Points, colour: str, title: str) -> None:
    axes.plot([x for x, _ in xs], [y for y, _ in ys], color=colour, marker="o", linewidth=1.4, label=title)
    for (x, x_error), (y, y_error) in zip(xs, ys, strict=True):
        axes.plot([x - x_error, x + x_error], [y, y], color=colour, linewidth=1, alpha=0.5)
        axes.plot([x, x], [y - y_error, y + y_error], color=colour, linewidth=1, alpha=0.5)


def _percent(row: dict[str, Any]) -> tuple[float, float]:
    """The share of copies and its standard error in %; not a number where a text has no n-grams so long."""
    share, error = row["copied"], row["copied_standard_error"]
    return math.nan if share is None else 100 * share, math.nan if error is None else 100 * error
