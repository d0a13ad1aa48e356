"""Plots, the report's above all, as SVG text that is the same, byte for byte, for the same data."""

import io
import math
from typing import Any

import matplotlib

# Before pyplot is imported, which otherwise looks for a display.
matplotlib.use("svg")

import matplotlib.pyplot as plt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator
from matplotlib.transforms import ScaledTranslation

CALM, TRANSFORMER, NEUTRAL, SECOND = "#0b6e99", "#c8553d", "#4a5560", "#8a6fae"
FURTHER = (SECOND, "#3b8f5a", "#b0822b", NEUTRAL)
"""Of models beside these, in turn."""

ALIKE = 0.02
"""Models whose compute differs by a smaller share have the same."""

BESIDE = 12
"""Points, of paper, between such models."""

STYLE: Any = {
    # Ids of elements are hashes, by default with a random salt: the same data would give another file each time.
    "svg.hashsalt": "calm",
    # Text stays text, in the reader's font: small, and searchable.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "axes.edgecolor": "#9aa4ad",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def brierlm_against_flops(models: dict[str, dict[str, Any]]) -> str:
    """BrierLM with its 95 % interval against training FLOPs, one point a model.

    ``models`` maps a name to {"training_flops", "brierlm", "brierlm_ci95", "colour"}.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        drawn: list[float] = []
        for name, model in models.items():
            score, flops = model["brierlm"], model["training_flops"]
            alike = sum(abs(flops / other - 1) < ALIKE for other in drawn)
            drawn.append(flops)
            low, high = model["brierlm_ci95"] or [score, score]
            # Models of equal compute stand beside each other: so many points on paper, whatever that is in FLOPs.
            beside = axes.transData + ScaledTranslation(BESIDE * alike / 72, 0, figure.dpi_scale_trans)
            # The interval as a line with two dashes as ends, and the point on it.
            line = {"color": model["colour"], "transform": beside}
            axes.plot([flops, flops], [low, high], marker="_", markersize=8, linewidth=2, **line)
            axes.plot(flops, score, marker="o", markersize=7, **line)
            axes.annotate(
                f"{name}  {score:.2f}",
                (flops, score),
                (BESIDE * alike + 10, 0),
                textcoords="offset points",
                va="center",
                parse_math=False,
            )
        axes.set(xscale="log", xlabel="training FLOPs, an autoencoder's included", ylabel="BrierLM (higher is better)")
        smallest = min(model["training_flops"] for model in models.values())
        largest = max(model["training_flops"] for model in models.values())
        # 1, 2 and 5 of each decade: matplotlib's own choice of labels runs together where there are one or two decades.
        axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
        # Room on the right for the labels, which stand beside their points.
        axes.set_xlim(smallest / 2, largest * 4)
        # What is drawn some points beside its place does not count for the limits that matplotlib finds.
        highest = max(max(model["brierlm_ci95"] or [model["brierlm"]]) for model in models.values())
        axes.set_ylim(0, 1.05 * highest or 1)
        axes.set_title("Quality against training compute")
        return svg(figure)


def brierlm_against_likelihood(panels: dict[str, dict[str, Any]]) -> str:
    """BrierLM with its 95 % interval, and below it Brier-1, against nats a token: a column a model, a line a training.

    ``panels`` maps a title to {"colour", "measure", "label", "runs"}: the name of the measure in a checkpoint, what it
    is called, and lists of checkpoints in the order of training, {"step", measure, "brierlm", "brierlm_ci95",
    "brier_1"} each.
    """
    with plt.rc_context(STYLE):
        size = (5.25 * len(panels), 5.8)
        figure, every = plt.subplots(2, len(panels), figsize=size, layout="constrained", sharex="col", squeeze=False)
        for (above, below), (title, panel) in zip(every.T, panels.items(), strict=True):
            measure, colour = panel["measure"], panel["colour"]
            for number, checkpoints in enumerate(panel["runs"]):
                nats = [row[measure] for row in checkpoints]
                for axes, score in ((above, "brierlm"), (below, "brier_1")):
                    scores = [row[score] for row in checkpoints]
                    axes.plot(nats, scores, color=colour, marker="osD^v"[number % 5], markersize=5, linewidth=1)
                for row in checkpoints:
                    ends = row["brierlm_ci95"] or [row["brierlm"]] * 2
                    above.plot([row[measure]] * 2, ends, color=colour, linewidth=1, alpha=0.4)
            first = panel["runs"][0]
            for row in (first[0], first[-1]):
                place = (row[measure], row["brier_1"])
                below.annotate(f"step {row['step']:,}", place, (6, 6), textcoords="offset points")
            # Both fall during training, so training goes to the right, and both measures improve to the upper right.
            above.invert_xaxis()
            for axes in (above, below):
                axes.margins(x=0.15, y=0.15)
            above.set_ylabel("BrierLM")
            above.set_title(title)
            below.set(xlabel=f"{panel['label']}, nats a token", ylabel="Brier-1")
        return svg(figure)


def brierlm_by_place(models: dict[str, dict[str, Any]]) -> str:
    """BrierLM with its 95 % interval by tokens before in the block, and by context.

    ``models`` maps a name to {"by_position", "by_context", "colour"}, the first two as in results/scores.
    """
    with plt.rc_context(STYLE):
        figure, (by_position, by_context) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
        for name, model in models.items():
            colour = model["colour"]
            middles = [sum(row["tokens_before"]) / 2 for row in model["by_position"]]
            _with_intervals(by_position, middles, model["by_position"], colour, name)
            contexts = [row["context_tokens"] for row in model["by_context"]]
            _with_intervals(by_context, contexts, model["by_context"], colour, name)
        by_position.set(xlabel="tokens before, in the block", ylabel="BrierLM", ylim=(0, None))
        by_position.set_title("By position in the block")
        by_context.set(xlabel="context, tokens", xscale="log", ylim=(0, None))
        lengths = sorted({row["context_tokens"] for model in models.values() for row in model["by_context"]})
        by_context.set_xticks(lengths, [f"{length:,}" for length in lengths])
        by_context.minorticks_off()
        by_context.set_title("By length of the block")
        by_position.legend(frameon=False)
        return svg(figure)


def likelihood_bounds(bounds: dict[float, list[tuple[int, float]]], exact: float) -> str:
    """Bounds of CALM's nats a token against the number of samples, a line a temperature of its decoder's softmax.

    ``bounds`` maps a temperature to (samples, nats a token); ``exact`` is the Transformer's, a line across.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        for number, (temperature, points) in enumerate(bounds.items()):
            samples, nats = zip(*points, strict=True)
            # From light to full, the highest temperature the fullest.
            alpha = 0.35 + 0.65 * number / max(1, len(bounds) - 1)
            label = f"tau {temperature:g}"
            axes.plot(samples, nats, color=CALM, alpha=alpha, marker="os^D"[number % 4], linewidth=1.4, label=label)
        axes.axhline(exact, color=TRANSFORMER, linewidth=1.4, linestyle="--")
        axes.annotate("Transformer, exact", (1, exact), (0, 5), textcoords="offset points", color=TRANSFORMER)
        # Room at the top for the label of the line across.
        top = 1.15 * max(exact, *(nats for points in bounds.values() for _, nats in points))
        axes.set(xscale="log", xlabel="samples N a patch", ylabel="nats a token", ylim=(0, top))
        numbers = sorted({count for points in bounds.values() for count, _ in points})
        axes.set_xticks(numbers, [str(count) for count in numbers])
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.set_title("CALM: bounds of the likelihood")
        return svg(figure)


def training_curves(curves: dict[str, dict[str, pl.DataFrame]]) -> str:
    """Two rows of panels over training steps; ``curves`` maps a model to its scalars, tables of step and value."""
    autoencoder, calm, transformer = curves["autoencoder"], curves["calm"], curves["transformer"]
    terms = [name for name in calm if name not in ("loss", "manifold_distance")]
    # A CALM with a token head has the Transformer's loss, which is not made of anything, and no latents.
    has_latents = "manifold_distance" in calm
    with plt.rc_context(STYLE):
        columns = 3 if has_latents else 2
        figure, panels = plt.subplots(2, columns, figsize=(3.5 * columns, 5.4), layout="constrained")
        if autoencoder:
            entropy, divergence = autoencoder["cross_entropy"], autoencoder["kl"]
            _line(panels[0, 0], entropy, NEUTRAL, "Autoencoder: cross entropy", ylabel="nats a token")
            panels[0, 0].set_yscale("log")
            _line(panels[0, 1], divergence, NEUTRAL, "Autoencoder: clipped KL", ylabel="nats a patch")
        else:  # that of calm.initial, which is not trained
            for axes in panels[0, :2]:
                axes.set_axis_off()
        of_transformer = panels[0, 2] if has_latents else panels[1, 1]
        _line(of_transformer, transformer["loss"], TRANSFORMER, "Transformer: cross entropy", ylabel="nats a token")
        if has_latents:
            _line(panels[1, 0], calm["loss"], CALM, "CALM: loss")
            for name, colour in zip(reversed(terms), (CALM, SECOND), strict=False):
                _line(panels[1, 1], calm[name], colour, "CALM: what the loss is made of", name.replace("_", " "))
            panels[1, 1].legend(frameon=False)
            distance = calm["manifold_distance"]
            _line(panels[1, 2], distance, CALM, "CALM: distance from the manifold", ylabel="a dimension")
            panels[1, 2].set_ylim(bottom=0)
        else:
            _line(panels[1, 0], calm["loss"], CALM, "CALM: cross entropy", ylabel="nats a token")
        for axes in panels[1]:
            axes.set_xlabel("step")
        return svg(figure)


def svg(figure: Figure) -> str:
    """``figure``, drawn under ``STYLE``, as SVG text from its first tag on; the figure is closed."""
    text = io.StringIO()
    # Without the date, which would make each file another.
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    # Inside a page an SVG has no XML declaration and no document type.
    return text.getvalue()[text.getvalue().index("<svg") :]


def _with_intervals(axes: Axes, places: list[float], rows: list[dict[str, Any]], colour: str, name: str) -> None:
    axes.plot(
        places, [row["brierlm"] for row in rows], color=colour, marker="o", markersize=5, linewidth=1.4, label=name
    )
    for place, row in zip(places, rows, strict=True):
        axes.plot([place, place], row["brierlm_ci95"] or [row["brierlm"]] * 2, color=colour, linewidth=1, alpha=0.5)


def _line(axes: Axes, table: pl.DataFrame, colour: str, title: str, label: str = "", ylabel: str = "") -> None:
    axes.plot(table["step"].to_list(), table[table.columns[-1]].to_list(), color=colour, linewidth=1.4, label=label)
    axes.set_title(title)
    axes.set_ylabel(ylabel)
