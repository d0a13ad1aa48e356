"""The paper's claims, each with a verdict that follows from the fits by a stated rule; nothing here is written by hand.

A claim is a quantity and a threshold that it has to reach. It holds here if the 95 % interval of the quantity lies at
or above the threshold, does not hold here if it lies below, and cannot be told here otherwise, or if a fit is
missing. Models are compared at equal training FLOPs with the autoencoder's charged in full, at the largest budget
that both have; exponents are of the language model's own FLOPs. "Here" are small models: the paper's CALM-M is trained
with some ten million times the FLOPs, 3.7e20 to the 3.2e13 of the largest core budget (``plan.CORE_BUDGETS``).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from calm_core.study.outcome import Measured, Outcome, among_the_best, frontier, token_accuracy
from calm_core.study.point import TRANSFORMER, calm, label
from calm_core.study.power_law import Floats, Interval, PowerLaw, interval

Verdict = Literal["holds here", "does not hold here", "cannot be told here"]
HOLDS: Verdict = "holds here"
DOES_NOT: Verdict = "does not hold here"
CANNOT: Verdict = "cannot be told here"

TRAINING_SAVING, INFERENCE_SAVING = 0.44, 0.34
"""CALM-M against Transformer-S, as published."""

SIZED_FOR = calm(4)
"""The K that params.yaml's autoencoder is sized for; every other K has the same one."""

LEAST_ACCURACY = 0.99
"""Share of tokens that autoencoders have to rebuild for a claim about another K. BrierLM asks for one to four tokens in
a row: where one in a hundred is lost the score is some 2.5 % lower, as much as the better points leave open, and tells
as much of the autoencoder as of K. The paper's rebuild 99.9 %. Where the share was not recorded nothing is judged by
it."""

FEW = "too few points, or scores above 0"


class Claim(NamedTuple):
    """One line of the page."""

    claim: str
    verdict: Verdict
    evidence: str


def verdict(quantity: Interval, threshold: float = 0.0) -> Verdict:
    """Whether ``quantity`` reaches ``threshold``, beyond what its interval leaves open."""
    if quantity.low >= threshold:
        return HOLDS
    return DOES_NOT if quantity.high < threshold else CANNOT


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim with several parts: each has to hold, and one that does not is enough."""
    if DOES_NOT in verdicts:
        return DOES_NOT
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else CANNOT


def claims(outcome: Outcome) -> list[Claim]:
    """The paper's claims, judged by BrierLM, the measure that it uses."""
    return [
        _savings(outcome),
        _exponents(
            outcome,
            "CALM gains more from scale than the Transformer: BrierLM rises with a larger exponent (K = 4)",
            calm(4),
            TRANSFORMER,
        ),
        _exponents(
            outcome,
            "Larger models gain more from a larger K: K = 8 gains more from scale than K = 4",
            calm(8),
            calm(4),
        ),
        _ahead(outcome, "K = 8 falls behind K = 4 at small scale", calm(4), [calm(8)]),
        _ahead(
            outcome,
            "K = 4 has the best frontier, ahead of K = 1, 2 and 8 and of the Transformer",
            calm(4),
            [calm(1), calm(2), calm(8), TRANSFORMER],
        ),
        _ahead(outcome, "K = 1 is worse than the Transformer", TRANSFORMER, [calm(1)]),
    ]


def training_saving(first: PowerLaw, second: PowerLaw, charge: float) -> Interval:
    """Share of training FLOPs that ``first`` saves against ``second`` at the best score that both reach.

    ``charge`` is added to what ``first`` needs. FLOPs below the measured range count as its smallest.
    """
    target = min(law.log_score(law.largest).estimate for law in (first, second))

    def needed(law: PowerLaw, lines: Floats) -> Floats:
        # A line that does not rise never gets there.
        with np.errstate(divide="ignore", over="ignore"):
            flops = law.centre * np.exp((target - lines[:, 0]) / lines[:, 1])
        return np.where(lines[:, 1] > 0, np.maximum(flops, law.smallest), np.inf)

    def saving(one: Floats, two: Floats) -> Floats:
        costs, yardstick = needed(first, one) + charge, needed(second, two)
        with np.errstate(invalid="ignore"):
            found = 1 - costs / yardstick
        # Where neither gets there nothing is saved or lost.
        return np.where(np.isinf(costs) & np.isinf(yardstick), 0.0, found)

    lines = [np.array([[law.intercept, law.exponent]]) for law in (first, second)]
    return interval(float(saving(*lines)[0]), saving(first.draws, second.draws))


class InferenceSaving(NamedTuple):
    """What one model saves of another's inference FLOPs, at the largest budget of each."""

    share: Interval
    """Of the two best widths; the ends are of those pairs of widths that save least and most."""
    widths: tuple[list[int], list[int]]
    """Of either model, those that cannot be told from its best."""


def inference_saving(measured: Sequence[Measured], first: str, second: str) -> InferenceSaving | None:
    """The share of inference FLOPs that ``first`` saves against ``second``; None if one of them was not measured.

    The best of several widths is best by chance where their intervals overlap, and FLOPs go with the width: so every
    pair of widths that may be the best is counted.
    """
    groups = [among_the_best(measured, model) for model in (first, second)]
    if not all(groups):
        return None
    costs = [[one.inference_flops_per_token for one in group] for group in groups]
    savings = [1 - ours / theirs for ours in costs[0] for theirs in costs[1]]
    ours, theirs = (sorted(one.hidden_size for one in group) for group in groups)
    return InferenceSaving(Interval(savings[0], min(savings), max(savings)), (ours, theirs))


def _savings(outcome: Outcome) -> Claim:
    text = (
        f"CALM with K = 4 reaches the Transformer's quality with {TRAINING_SAVING:.0%} fewer training and "
        f"{INFERENCE_SAVING:.0%} fewer inference FLOPs"
    ).replace("%", "\N{NO-BREAK SPACE}%")
    ours, theirs = (outcome.fits["brierlm"].get(model) for model in (calm(4), TRANSFORMER))
    inference = inference_saving(outcome.measured, calm(4), TRANSFORMER)
    if ours is None or theirs is None or inference is None:
        return Claim(text, CANNOT, FEW)
    charge = _charge(outcome, calm(4))
    whole, alone = (training_saving(ours, theirs, flops) for flops in (charge, 0.0))
    training = f"{_share(whole)} with the autoencoder, {_share(alone)} without" if charge else _share(alone)
    found = all_of([verdict(whole, TRAINING_SAVING), verdict(inference.share, INFERENCE_SAVING)])
    widths = [" or ".join(map(str, of_model)) for of_model in inference.widths]
    evidence = (
        f"at the best score that both reach: training {training}; "
        f"inference {_share(inference.share)} at the largest budget, where the best width may be {widths[0]} of "
        f"{label(calm(4))} and {widths[1]} of the {label(TRANSFORMER)}"
    )
    return Claim(text, found, evidence)


def _exponents(outcome: Outcome, text: str, first: str, second: str) -> Claim:
    one, two = (outcome.fits["brierlm"].get(model) for model in (first, second))
    if one is None or two is None:
        return Claim(text, CANNOT, FEW)
    difference = interval(one.exponent - two.exponent, one.draws[:, 1] - two.draws[:, 1])
    evidence = (
        f"exponents {one.exponent:.2f} ({label(first)}) and {two.exponent:.2f} ({label(second)}); "
        f"difference {difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    )
    return _if_rebuilt(outcome, Claim(text, verdict(difference), evidence), [first, second])


def _ahead(outcome: Outcome, text: str, first: str, others: list[str]) -> Claim:
    """``first`` has the better score than each of ``others`` at equal training FLOPs."""
    found: list[Verdict] = []
    told: list[str] = []
    for other in others:
        ratio = _log_ratio(outcome, first, other)
        if ratio is None:
            found.append(CANNOT)
            told.append(f"not to be compared with {label(other)}'s, {FEW}")
            continue
        factor = Interval(*(float(np.exp(value)) for value in ratio))
        found.append(verdict(ratio))
        told.append(f"{factor.estimate:.2f} [{factor.low:.2f}, {factor.high:.2f}] times {label(other)}'s")
    claim = Claim(text, all_of(found), f"BrierLM of {label(first)} is " + "; ".join(told))
    return _if_rebuilt(outcome, claim, [first, *others])


def _if_rebuilt(outcome: Outcome, claim: Claim, models: Sequence[str]) -> Claim:
    """``claim``, about ``models``; not to be told if it is about another K and an autoencoder rebuilds too little."""
    of_calm = [model for model in models if model != TRANSFORMER]
    shares = {model: token_accuracy(outcome.measured, model) for model in of_calm}
    lost = {model: share for model, share in shares.items() if share is not None and share < LEAST_ACCURACY}
    if not lost or set(of_calm) <= {SIZED_FOR}:
        return claim
    told = ", ".join(f"{100 * share:.1f}\N{NO-BREAK SPACE}% ({label(model)})" for model, share in lost.items())
    return Claim(
        claim.claim,
        CANNOT,
        f"{claim.evidence}; but of the tokens autoencoders rebuild {told}, where less than "
        f"{100 * LEAST_ACCURACY:.0f}\N{NO-BREAK SPACE}% says as much of them as of K",
    )


def _log_ratio(outcome: Outcome, first: str, second: str) -> Interval | None:
    """Of the two models' scores at the largest training FLOPs, the autoencoder's counted, that both have fits for."""
    one, two = (outcome.fits["brierlm"].get(model) for model in (first, second))
    if one is None or two is None:
        return None
    charges = [_charge(outcome, model) for model in (first, second)]
    budget = min(law.largest + charge for law, charge in zip((one, two), charges, strict=True))
    left = [budget - charge for charge in charges]
    # What an autoencoder leaves of the budget may be less than was ever measured.
    if left[0] < one.smallest or left[1] < two.smallest:
        return None
    estimate = one.log_score(left[0]).estimate - two.log_score(left[1]).estimate
    draws = one.log_score_draws(np.array(left[0])) - two.log_score_draws(np.array(left[1]))
    return interval(estimate, draws)


def _charge(outcome: Outcome, model: str) -> float:
    best = frontier(outcome.measured, model, "brierlm")
    return best[-1].autoencoder_flops if best else 0.0


def _share(saving: Interval) -> str:
    return f"{_change(saving.estimate)} [{_change(saving.high)}, {_change(saving.low)}]"


def _change(saving: float) -> str:
    """A saving as the change that it is: 0.44 as -44 %."""
    return "no bound" if np.isinf(saving) else f"{-100 * saving:+,.0f}\N{NO-BREAK SPACE}%"
