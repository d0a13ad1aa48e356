"""Time a token against context length, K, model width and corpus size, with the exponent of each curve.

Notable:
- the points take turns, round after round, so that what slows the machine slows every curve; medians count;
- time = constant * x^exponent is fitted by least squares on logarithms; the exponent of the counted FLOPs over the same
  points stands beside it. A curve that is no power law shows in the standard error.

`python -m benchmarks.scaling` writes results/scaling.json, docs/scaling.svg and two sections of docs/performance.md,
the second from ``scaling_plan``.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from benchmarks.pages import rewrite_section
from benchmarks.scaling_plan import paper_tables
from benchmarks.scaling_points import (
    CONTEXT_AXIS,
    CORPUS_AXIS,
    PATCH_AXIS,
    WIDTH_AXIS,
    Point,
    choosing_points,
    corpus_points,
    model_points,
)
from calm_core.params import load_params
from calm_core.report.figures import CALM, NEUTRAL, SECOND, STYLE, TRANSFORMER, svg
from calm_core.runtime.machine import describe_machine
from calm_core.runtime.precision import set_threads
from calm_core.runtime.progress import progress
from calm_core.storage.atomic import write_text
from calm_core.storage.json_io import write_json

ROUNDS = 5
PLACES = {CONTEXT_AXIS: (64, 128, 256, 512, 1024), PATCH_AXIS: (1, 2, 4, 8), WIDTH_AXIS: (64, 128, 256, 512)}
DOCUMENTS, BLOCKS = (500, 1000, 2000, 4000), (10_000, 100_000, 1_000_000, 10_000_000)
COLOURS = {"CALM": CALM, "Transformer": TRANSFORMER, "tokenise": NEUTRAL, "encode": SECOND}


class Fit(NamedTuple):
    """y = constant * x^exponent."""

    exponent: float
    standard_error: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares on logarithms of 3 or more points; the standard error is that of the line's slope."""
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    exponent, intercept = statistics.linear_regression(log_x, log_y)
    residual = sum((b - intercept - exponent * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    mean = statistics.fmean(log_x)
    return Fit(exponent, math.sqrt(residual / (len(x) - 2) / sum((a - mean) ** 2 for a in log_x)))


def in_turns(points: Sequence[Point], rounds: int = ROUNDS) -> list[float]:
    """Median seconds a token of each point over ``rounds`` rounds, after one that warms up."""
    turns = []
    with progress("scaling", rounds + 1, "rounds") as advance:
        for _ in range(rounds + 1):
            turns.append([point.seconds() for point in points])
            advance()
    return [statistics.median(seconds) for seconds in zip(*turns[1:], strict=True)]


def curves_of(points: Sequence[Point], medians: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each curve, in the order of its first point: where it was measured, time a token, exponents."""
    curves: dict[tuple[str, str], list[tuple[Point, float]]] = {}
    for point, seconds in zip(points, medians, strict=True):
        curves.setdefault((point.axis, point.curve), []).append((point, seconds))
    rows = []
    for (axis, curve), places in curves.items():
        x, y = [point.x for point, _ in places], [seconds for _, seconds in places]
        flops = [point.flops for point, _ in places if point.flops is not None]
        row = {"axis": axis, "curve": curve, "x": x, "seconds_per_token": y, **fit(x, y)._asdict()}
        rows.append({**row, "flops_per_token": flops, "flops_exponent": fit(x, flops).exponent if flops else None})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The curves as a Markdown table."""
    lines = ["| against | what | µs a token | exponent | of the FLOPs |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        places = zip(row["x"], row["seconds_per_token"], strict=True)
        micros = ", ".join(f"{_short(x)}: {_three_digits(1e6 * seconds)}" for x, seconds in places)
        counted = "" if row["flops_exponent"] is None else f"{row['flops_exponent']:.2f}"
        lines.append(f"| {row['axis']} | {row['curve']} | {micros} | {_exponent(row)} | {counted} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """A panel for each axis as SVG, with exponents; dashed where text is generated, dotted for batches."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10.5, 9), layout="constrained")
        for panel, axis in zip(panels.flat, dict.fromkeys(row["axis"] for row in rows), strict=True):
            own = [row for row in rows if row["axis"] == axis]
            for row in own:
                line = "--" if "generation" in row["curve"] else ":" if "batch" in row["curve"] else "-"
                colour = COLOURS.get(row["curve"].partition(",")[0], "#333333")
                micros = [1e6 * seconds for seconds in row["seconds_per_token"]]
                panel.plot(row["x"], micros, line, color=colour, marker="o", label=f"{row['curve']}: {_exponent(row)}")
            panel.set(xscale="log", yscale="log", title=f"Against {axis}", ylabel="µs a token")
            if axis != CORPUS_AXIS:
                panel.set_xticks(own[0]["x"], [str(x) for x in own[0]["x"]])
                panel.xaxis.minorticks_off()
            panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.08))
        return svg(figure)


def main() -> None:
    """Measure, fit, write."""
    params = load_params()
    set_threads(params.runtime.threads)
    with tempfile.TemporaryDirectory() as folder:
        points = [point for axis, places in PLACES.items() for point in model_points(params, axis, places)]
        points += [*corpus_points(params, Path(folder), DOCUMENTS), *choosing_points(BLOCKS)]
        rows = curves_of(points, in_turns(points))
    paper, estimates = paper_tables()
    plan = [estimate._asdict() for estimate in estimates]
    measured = {"machine": describe_machine(), "rounds": ROUNDS, "curves": rows}
    write_json(Path("results/scaling.json"), {**measured, "plan": plan})
    write_text(Path("docs/scaling.svg"), plot(rows))
    for name, text in (("scaling", table(rows)), ("scaling on paper", paper)):
        rewrite_section(Path("docs/performance.md"), name, text)
        print(f"{text}\n")


def _exponent(row: dict[str, Any]) -> str:
    return f"{row['exponent']:.2f} ± {row['standard_error']:.2f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _short(x: int) -> str:
    return str(x) if x < 10_000 else f"{_three_digits(x / 1e6)} M"


if __name__ == "__main__":
    main()
