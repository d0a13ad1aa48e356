"""Plots, the report's above all, as SVG text that is the same, byte for byte, for the same data."""

import io
from typing import Any

import matplotlib

# Before pyplot is imported, which otherwise looks for a display.
matplotlib.use("svg")

import matplotlib.pyplot as plt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CALM, TRANSFORMER, NEUTRAL, SECOND = "#0b6e99", "#c8553d", "#4a5560", "#8a6fae"
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
        for name, model in models.items():
            # The interval as a line with two dashes as ends, and the point on it.
            low, high = model["brierlm_ci95"]
            score, flops = model["brierlm"], model["training_flops"]
            axes.plot([flops, flops], [low, high], color=model["colour"], marker="_", markersize=10, linewidth=2)
            axes.plot(flops, score, color=model["colour"], marker="o", markersize=7)
            axes.annotate(
                f"{name}  {score:.2f}",
                (flops, score),
                (10, 0),
                textcoords="offset points",
                va="center",
                parse_math=False,
            )
        axes.set(xscale="log", xlabel="training FLOPs", ylabel="BrierLM (higher is better)")
        smallest = min(model["training_flops"] for model in models.values())
        largest = max(model["training_flops"] for model in models.values())
        # Room on the right for the labels, which stand beside their points.
        axes.set_xlim(smallest / 2, largest * 4)
        axes.set_ylim(bottom=0)
        axes.set_title("Quality against training compute")
        return svg(figure)


def brierlm_against_cross_entropy(checkpoints: list[dict[str, Any]]) -> str:
    """BrierLM with its 95 % interval against cross entropy, one point a checkpoint, in the order of training.

    Each of ``checkpoints`` has {"step", "cross_entropy_nats", "brierlm", "brierlm_ci95"}.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        entropies = [row["cross_entropy_nats"] for row in checkpoints]
        axes.plot(entropies, [row["brierlm"] for row in checkpoints], color=TRANSFORMER, marker="o", linewidth=1)
        for row in checkpoints:
            axes.plot([row["cross_entropy_nats"]] * 2, row["brierlm_ci95"], color=TRANSFORMER, linewidth=1, alpha=0.5)
        for row in (checkpoints[0], checkpoints[-1]):
            place = (row["cross_entropy_nats"], row["brierlm"])
            axes.annotate(f"step {row['step']:,}", place, (6, 6), textcoords="offset points")
        # Cross entropy falls during training, so training goes to the right, and both measures improve to the upper
        # right.
        axes.invert_xaxis()
        axes.margins(x=0.15)
        axes.set(xlabel="cross entropy, nats a token (training goes to the right)", ylabel="BrierLM")
        axes.set_title("Transformer checkpoints: two measures")
        return svg(figure)


def training_curves(curves: dict[str, dict[str, pl.DataFrame]]) -> str:
    """Two rows of panels over training steps; ``curves`` maps a model to its scalars, tables of step and value."""
    autoencoder, calm, transformer = curves["autoencoder"], curves["calm"], curves["transformer"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(10.5, 5.4), layout="constrained")
        _line(panels[0, 0], autoencoder["cross_entropy"], NEUTRAL, "Autoencoder: cross entropy", ylabel="nats a token")
        panels[0, 0].set_yscale("log")
        _line(panels[0, 1], autoencoder["kl"], NEUTRAL, "Autoencoder: clipped KL", ylabel="nats a patch")
        _line(panels[0, 2], transformer["loss"], TRANSFORMER, "Transformer: cross entropy", ylabel="nats a token")
        _line(panels[1, 0], calm["loss"], CALM, "CALM: loss")
        terms = [name for name in calm if name not in ("loss", "manifold_distance")]
        for name, colour in zip(reversed(terms), (CALM, SECOND), strict=False):
            _line(panels[1, 1], calm[name], colour, "CALM: what the loss is made of", name.replace("_", " "))
        panels[1, 1].legend(frameon=False)
        _line(panels[1, 2], calm["manifold_distance"], CALM, "CALM: distance from the manifold", ylabel="a dimension")
        panels[1, 2].set_ylim(bottom=0)
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


def _line(axes: Axes, table: pl.DataFrame, colour: str, title: str, label: str = "", ylabel: str = "") -> None:
    axes.plot(table["step"].to_list(), table[table.columns[-1]].to_list(), color=colour, linewidth=1.4, label=label)
    axes.set_title(title)
    axes.set_ylabel(ylabel)
