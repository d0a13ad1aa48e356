"""The study's page, results/study.html: one file that needs nothing else, from what results/study.json holds."""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from calm_core.study.claims import CANNOT, DOES_NOT, HOLDS, LEAST_ACCURACY, claims
from calm_core.study.figures import TITLES, against_inference, against_training, colour, inference_budget
from calm_core.study.outcome import MEASURES, Outcome, frontier, outcome, token_accuracy
from calm_core.study.point import TRANSFORMER, Point, label
from calm_core.study.power_law import Crossing, crossing

VERDICT_CLASSES = {HOLDS: "holds", DOES_NOT: "fails", CANNOT: "open"}

FARTHEST = 1000
"""Times the largest budget: beyond it an extrapolation from two decades is no number worth printing."""


AGREED = 0.95
"""Share of the draws that have to say the same before a sentence says it flatly."""


def render_study(points: Sequence[Point], facts: dict[str, str]) -> str:
    """The page as text; ``facts`` are rows of its last table, name to value.

    It can be made at any time, from whatever points are completed.
    """
    found = outcome(points)
    completed = [point for point in points if point.state == "completed"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calm_core.study", "."), undefined=jinja2.StrictUndefined, autoescape=True
    )
    figures: dict[str, str] = {}
    if found.measured:
        figures["alone"] = against_training(found, charged=False)
        if any(one.autoencoder_flops for one in found.measured):
            figures["whole"] = against_training(found, charged=True)
        figures["inference"] = against_inference(found)
    return environment.get_template("study.html.jinja").render(
        points=points,
        completed=completed,
        failed=[point for point in points if point.state == "failed"],
        hours=sum(point.seconds or 0 for point in completed) / 3600,
        tiles=_tiles(found),
        decades=_decades(completed),
        claims=claims(found),
        verdict_classes=VERDICT_CLASSES,
        figures=figures,
        inference_budget=inference_budget(found.measured) if found.measured else None,
        laws=_laws(found),
        without_interval=sum(
            "bits_per_byte" in point.scores and "bits_per_byte_low" not in point.scores for point in completed
        ),
        most_seeds=max((one.seeds for one in found.measured), default=0),
        crossings=_crossings(found),
        least_accuracy=LEAST_ACCURACY,
        autoencoders=_autoencoders(found),
        facts=facts,
        label=label,
        colour=colour,
        power=power,
    )


def power(value: float) -> str:
    """5.24e11, as a number of FLOPs is written."""
    if np.isinf(value):
        return "∞"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def crossing_sentence(first: str, second: str, found: Crossing, back: Crossing | None = None) -> str:
    """What ``found`` says of the models ``first`` and ``second``, flatly where ``AGREED`` of the draws say the same.

    ``back`` is the crossing the other way round, where the second overtakes the first.
    """
    ours, theirs = label(first), f"the {label(second)}"
    behind = 1 - found.ahead_at_the_end >= AGREED
    if behind or found.ahead_at_the_end >= AGREED:
        now = f"{ours} is {'behind' if behind else 'ahead'} at the largest budget"
    else:
        now = "either may be ahead at the largest budget"
    span = _span(found)
    if 1 - found.gains >= AGREED:
        return f"No crossing is looked for, since {ours} gains nothing from scale; {now}."
    if 1 - found.gains_more >= AGREED:
        if back and back.where in ("within", "beyond") and back.flops.high <= FARTHEST * back.largest:
            which = "which" if back.where == "within" else "which, extrapolated,"
            return f"{ours} gains less from scale than {theirs}, {which} overtakes it at {_span(back)}; {now}."
        return f"No crossing after which {ours} stays ahead: it gains less from scale than {theirs}; {now}."
    if found.ahead_throughout >= AGREED:
        return f"{ours} is ahead at every budget measured, and gains more from scale."
    if behind and found.flops.low > FARTHEST * found.largest:
        return f"{ours} is behind, and the fits do not meet within {FARTHEST:,.0f} times the largest budget."
    bounded = found.flops.high <= FARTHEST * found.largest
    if found.where == "within" and bounded:
        return f"{ours} overtakes {theirs} at {span}."
    if found.where == "beyond" and bounded and behind:
        return f"{ours} is behind; extrapolated, the fits meet at {span}."
    return f"Cannot be told: {now}, and the fits meet at {span}."


def _span(found: Crossing) -> str:
    """The FLOPs and their interval, without numbers so far from the measured range that they say nothing."""
    least, most = found.smallest / FARTHEST, found.largest * FARTHEST
    estimate, low, high = found.flops
    if least <= estimate <= most:
        middle = f"{power(estimate)} FLOPs"
    else:
        middle = f"more than {power(most)} FLOPs" if estimate > most else f"less than {power(least)} FLOPs"
    lower = "no lower end" if low < least else power(low) if low <= most else power(most)
    upper = "no upper end" if high > most else power(high) if high >= least else power(least)
    return f"{middle} [{lower}, {upper}]"


def _tiles(found: Outcome) -> list[dict[str, str]]:
    """Each model at its largest budget."""
    tiles = []
    for model in dict.fromkeys(one.model for one in found.measured):
        best = frontier(found.measured, model, "brierlm")[-1]
        score = best.brierlm
        tiles.append(
            {
                "model": model,
                "score": f"{score.estimate:.2f}",
                "interval": f"[{score.low:.2f}, {score.high:.2f}]",
                "budget": power(best.budget),
                "width": str(best.hidden_size),
            }
        )
    return tiles


def _decades(completed: Sequence[Point]) -> float:
    budgets = [point.budget for point in completed]
    return float(np.log10(max(budgets) / min(budgets))) if budgets else 0.0


def _laws(found: Outcome) -> list[dict[str, Any]]:
    rows = []
    for measure in MEASURES:
        for model, law in found.fits[measure].items():
            scores = [one.score(measure) for one in frontier(found.measured, model, measure)]
            row: dict[str, Any] = {"measure": TITLES[measure], "model": model, "law": law, "points": len(scores)}
            if law is not None:
                exponent = law.exponent_interval
                end = law.log_score(law.largest)
                row |= {
                    "points": law.points,
                    "exponent": f"{exponent.estimate:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]",
                    "end": "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp(end)),
                    "residual": f"{100 * law.residual:.1f} %",
                }
            if any(score is not None for score in scores):
                rows.append(row)
    return rows


def _autoencoders(found: Outcome) -> list[dict[str, str]]:
    rows = []
    # A model that is charged none has no latents, or is the Transformer.
    charged = [one for one in found.measured if one.model != TRANSFORMER and one.autoencoder_flops]
    for one in {one.model: one for one in charged}.values():
        share = token_accuracy(found.measured, one.model)
        told = "not recorded" if share is None else f"{100 * share:.2f} %"
        rows.append({"model": one.model, "flops": power(one.autoencoder_flops), "rebuilt": told})
    return rows


def _crossings(found: Outcome) -> list[dict[str, str]]:
    rows = []
    for measure in MEASURES:
        fits = found.fits[measure]
        baseline = fits.get(TRANSFORMER)
        for model, law in fits.items():
            if model == TRANSFORMER or law is None or baseline is None:
                continue
            higher = measure == "brierlm"
            charges = {"alone": 0.0, "whole": frontier(found.measured, model, measure)[-1].autoencoder_flops}
            # A charge on the model that is overtaken may make two crossings of one.
            back = crossing(baseline, law, higher_is_better=higher)
            sentences = {
                account: crossing_sentence(
                    model, TRANSFORMER, crossing(law, baseline, charge, higher), None if charge else back
                )
                for account, charge in charges.items()
            }
            rows.append({"measure": TITLES[measure].split(" (")[0], "model": model, **sentences})
    return rows
