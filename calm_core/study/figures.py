"""The study's plots, in the style of the report's."""

from collections import Counter
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from calm_core.report.figures import CALM, NEUTRAL, STYLE, svg
from calm_core.report.figures import TRANSFORMER as TRANSFORMER_COLOUR
from calm_core.study.outcome import MEASURES, Measured, Outcome, clear_of_zero, frontier
from calm_core.study.point import TRANSFORMER, label
from calm_core.study.power_law import Interval, PowerLaw

BLUES = {1: "#a9cfe0", 2: "#5aa5c8", 4: CALM, 8: "#0a3a55"}
"""Of CALM: darker for a larger K."""

TITLES = {"brierlm": "BrierLM (higher is better)", "bits_per_byte": "Bits a byte (lower is better)"}

LOWEST_BRIERLM = 0.02
"""Where the axis begins at the latest: lower scores say nothing that points of this size could resolve."""


def colour(model: str) -> str:
    """The model's, in all plots."""
    return TRANSFORMER_COLOUR if model == TRANSFORMER else BLUES.get(int(model.removeprefix("calm-")), NEUTRAL)


def against_training(outcome: Outcome, charged: bool) -> str:
    """Both measures against training FLOPs, of the language model alone or with the autoencoder ``charged`` in full.

    Filled: the best width at a budget, with its 95 % interval; hollow: the other widths; line and band: the power law
    and its 95 % interval. A triangle at the lower edge stands for a BrierLM that cannot be told from 0.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained")
        for axes, measure in zip(panels, MEASURES, strict=True):
            floor = _floor(outcome.measured, measure)
            for model in _models(outcome.measured):
                best = frontier(outcome.measured, model, measure)
                others = [one for one in outcome.measured if one.model == model and one not in best]
                _points(axes, best, others, measure, charged, floor)
                law = outcome.fits[measure].get(model)
                if law is not None:
                    _law(axes, law, colour(model), best[-1].autoencoder_flops if charged else 0.0)
            with_autoencoder = ", the autoencoder's included" if charged else " of the language model alone"
            _finish(axes, outcome.measured, measure, f"training FLOPs{with_autoencoder}", floor)
        _legend(figure, outcome.measured)
        return svg(figure)


def against_inference(outcome: Outcome) -> str:
    """Both measures against inference FLOPs a token, a line through a model's widths; at ``inference_budget``."""
    budget = inference_budget(outcome.measured)
    at_budget = [one for one in outcome.measured if one.budget == budget]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
        for axes, measure in zip(panels, MEASURES, strict=True):
            floor = _floor(at_budget, measure)
            for model in _models(at_budget):
                of_model = sorted(
                    (one for one in at_budget if one.model == model), key=lambda one: one.inference_flops_per_token
                )
                shown = clear_of_zero(of_model, measure)
                places = [one.inference_flops_per_token for one, _ in shown]
                axes.plot(places, [score.estimate for _, score in shown], color=colour(model), linewidth=1.4)
                _with_intervals(axes, places, [score for _, score in shown], colour(model))
            _finish(axes, at_budget, measure, "inference FLOPs a token", floor)
        _legend(figure, at_budget)
        return svg(figure)


def inference_budget(measured: Sequence[Measured]) -> float:
    """The largest budget at which most models have two widths or more; else the largest that most models have."""
    budgets = sorted({one.budget for one in measured}, reverse=True)
    for budget in budgets:
        of_model = Counter(one.model for one in measured if one.budget == budget)
        if 2 * sum(widths > 1 for widths in of_model.values()) > len(_models(measured)):
            return budget
    models = {budget: len({one.model for one in measured if one.budget == budget}) for budget in budgets}
    return max(budgets, key=lambda budget: (models[budget], budget))


def _points(
    axes: Axes, best: Sequence[Measured], others: Sequence[Measured], measure: str, charged: bool, floor: float
) -> None:
    def place(one: Measured) -> float:
        return one.training_flops + (one.autoencoder_flops if charged else 0.0)

    told, told_others = clear_of_zero(best, measure), clear_of_zero(others, measure)
    clear = [one for one, _ in (*told, *told_others)]
    ink = colour(best[0].model) if best else NEUTRAL
    unclear = [place(one) for one in (*best, *others) if one not in clear and one.score(measure) is not None]
    axes.plot(unclear, [1.12 * floor] * len(unclear), "v", color=ink, markersize=5, alpha=0.7)
    _hollow(axes, [place(one) for one, _ in told_others], [score for _, score in told_others], ink)
    _with_intervals(axes, [place(one) for one, _ in told], [score for _, score in told], ink)


def _hollow(axes: Axes, places: Sequence[float], scores: Sequence[Interval], ink: str) -> None:
    estimates = [score.estimate for score in scores]
    axes.plot(places, estimates, "o", color=ink, markersize=4, markerfacecolor="none", alpha=0.6)


def _with_intervals(axes: Axes, places: Sequence[float], scores: Sequence[Interval], ink: str) -> None:
    low, high = [score.low for score in scores], [score.high for score in scores]
    axes.vlines(places, low, high, color=ink, linewidth=1.6, alpha=0.55)
    axes.plot(places, [score.estimate for score in scores], "o", color=ink, markersize=5.5)


def _law(axes: Axes, law: PowerLaw, ink: str, charge: float) -> None:
    flops = np.geomspace(law.smallest, law.largest, 25)
    lines = [law.log_score(value) for value in flops]
    axes.plot(flops + charge, np.exp([line.estimate for line in lines]), color=ink, linewidth=1.4)
    axes.fill_between(
        flops + charge,
        np.exp([line.low for line in lines]),
        np.exp([line.high for line in lines]),
        color=ink,
        alpha=0.12,
        linewidth=0,
    )


def _finish(axes: Axes, measured: Sequence[Measured], measure: str, xlabel: str, floor: float) -> None:
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.set_title(TITLES[measure])
    low, high = axes.get_xlim()
    # A decade or less would have one label or none at powers of ten alone.
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 30 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e+", "e"))
    )
    # Bits a byte differ by a few tenths.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if measure == "brierlm" else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    scores = [score for one in measured if (score := one.score(measure)) is not None]
    if measure == "brierlm":
        # Room above: an interval at most doubles the axis.
        axes.set_ylim(floor, max([2 * floor, *(1.25 * score.high for score in scores)]))
    if not scores:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=NEUTRAL)
        axes.set_yticks([])


def _floor(measured: Sequence[Measured], measure: str) -> float:
    """Where the axis of ``measure`` begins."""
    if measure != "brierlm":
        return 0.0
    told = [score.low for _, score in clear_of_zero(measured, measure)]
    return max(LOWEST_BRIERLM, 0.7 * min(told, default=0.1))


def _legend(figure: Figure, measured: Sequence[Measured]) -> None:
    models = _models(measured)
    handles = [Line2D([], [], color=colour(model), marker="o", markersize=5.5, label=label(model)) for model in models]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handletextpad=0.5)


def _models(measured: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(one.model for one in measured))
