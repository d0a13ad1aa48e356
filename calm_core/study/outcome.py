"""From points to what is compared: scores over seeds, the best width at each budget, and a power law for each model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from calm_core.study.point import TRANSFORMER, Point
from calm_core.study.power_law import DRAWS, NORMAL_95, Interval, PowerLaw, fit_power_law, interval

MEASURES = ("brierlm", "bits_per_byte")


class Measured(NamedTuple):
    """One model of one width at one budget, over the seeds there are."""

    model: str
    hidden_size: int
    budget: float
    training_flops: float
    autoencoder_flops: float
    inference_flops_per_token: float
    brierlm: Interval
    """Over documents and, from two seeds on, over seeds."""
    bits_per_byte: Interval | None
    """The same; without an interval over documents where the points have none."""
    seeds: int
    token_accuracy: float | None
    """Share of held-out tokens that the autoencoder rebuilds, under the worst seed; None where it was not recorded."""

    def score(self, measure: str) -> Interval | None:
        """One of ``MEASURES``."""
        return self.brierlm if measure == "brierlm" else self.bits_per_byte


class Outcome(NamedTuple):
    """All that the page and the claims are made of."""

    measured: list[Measured]
    fits: dict[str, dict[str, PowerLaw | None]]
    """For each measure and model, over the model's frontier, against the FLOPs of the language model alone."""


def outcome(points: Sequence[Point]) -> Outcome:
    """Of the completed ones among ``points``; random draws are the same for the same points."""
    generator = np.random.default_rng(0)
    measured = _over_seeds(points, generator)
    models = list(dict.fromkeys(one.model for one in measured))
    fits: dict[str, dict[str, PowerLaw | None]] = {}
    for measure in MEASURES:
        fits[measure] = {}
        for model in models:
            best = [(one.training_flops, one.score(measure)) for one in frontier(measured, model, measure)]
            scores = [(flops, score) for flops, score in best if score is not None]
            fits[measure][model] = fit_power_law([x for x, _ in scores], [y for _, y in scores], generator)
    return Outcome(measured, fits)


def frontier(measured: Sequence[Measured], model: str, measure: str) -> list[Measured]:
    """The width of ``model`` with the best score at each budget, by rising budget."""
    best: dict[float, tuple[float, Measured]] = {}
    for one in measured:
        score = one.score(measure)
        if one.model != model or score is None:
            continue
        rank = score.estimate if measure == "brierlm" else -score.estimate
        if one.budget not in best or rank > best[one.budget][0]:
            best[one.budget] = (rank, one)
    return [best[budget][1] for budget in sorted(best)]


def clear_of_zero(measured: Sequence[Measured], measure: str) -> list[tuple[Measured, Interval]]:
    """Those whose interval lies above 0, which a logarithmic axis can show; fits leave out none."""
    scores = [(one, one.score(measure)) for one in measured]
    return [(one, score) for one, score in scores if score is not None and score.low > 0]


def among_the_best(measured: Sequence[Measured], model: str) -> list[Measured]:
    """The widths of ``model`` at its largest budget whose BrierLM cannot be told from the best one's, that one first.

    Their intervals overlap its. Empty if ``model`` was not measured.
    """
    best = frontier(measured, model, "brierlm")[-1:]
    return best + [
        one
        for top in best
        for one in measured
        if (one.model, one.budget) == (model, top.budget) and one is not top and one.brierlm.high >= top.brierlm.low
    ]


def token_accuracy(measured: Sequence[Measured], model: str) -> float | None:
    """Share of held-out tokens that the autoencoder of ``model`` rebuilds; None where it was not recorded."""
    return min(
        (one.token_accuracy for one in measured if one.model == model and one.token_accuracy is not None), default=None
    )


def _over_seeds(points: Sequence[Point], generator: np.random.Generator) -> list[Measured]:
    groups: dict[tuple[str, int, float], list[Point]] = {}
    for point in points:
        if point.state == "completed" and "brierlm" in point.scores:
            groups.setdefault((point.model, point.hidden_size, point.budget), []).append(point)
    found = []
    for (model, hidden_size, budget), group in groups.items():
        brierlm = _score(group, "brierlm", generator)
        assert brierlm is not None
        one = group[0]
        found.append(
            Measured(
                model,
                hidden_size,
                budget,
                one.training_flops,
                one.autoencoder_flops,
                one.inference_flops_per_token,
                brierlm,
                _score(group, "bits_per_byte", generator),
                len(group),
                min(
                    (point.scores["token_accuracy"] for point in group if "token_accuracy" in point.scores),
                    default=None,
                ),
            )
        )
    return sorted(found, key=lambda one: (one.model != TRANSFORMER, one.model, one.budget, one.hidden_size))


def _score(group: Sequence[Point], measure: str, generator: np.random.Generator) -> Interval | None:
    """The mean over ``group``, one point a seed; None if ``measure`` was not measured.

    A point without an interval of its own, over documents, is taken to have none.
    """
    of = [point.scores for point in group if measure in point.scores]
    if not of:
        return None
    scores = [one[measure] for one in of]
    mean = float(np.mean(scores))
    low, high = (float(np.mean([one.get(f"{measure}_{end}", one[measure]) for one in of])) for end in ("low", "high"))
    if len(scores) == 1:
        return Interval(mean, low, high)
    # Student's distribution for what seeds do, the normal one for what documents do: all seeds meet the same ones.
    seeds = np.std(scores, ddof=1) / np.sqrt(len(scores)) * generator.standard_t(len(scores) - 1, DRAWS)
    documents = (high - low) / (2 * NORMAL_95) * generator.standard_normal(DRAWS)
    return interval(mean, mean + seeds + documents)
