"""Each verdict from points that were made for it."""

import math
from dataclasses import replace

import pytest

from calm_core.study.claims import CANNOT, DOES_NOT, HOLDS, Claim, all_of, claims, training_saving, verdict
from calm_core.study.outcome import outcome
from calm_core.study.point import TRANSFORMER, calm
from calm_core.study.power_law import Interval
from tests.calm_core.study.made_up import BUDGETS, point, points

PAPER = {TRANSFORMER: (2.0, 0.4), calm(1): (1.0, 0.4), calm(2): (2.2, 0.45), calm(4): (3.0, 0.5), calm(8): (1.0, 0.6)}
"""Laws under which every claim holds, if inference is cheap enough."""


def judged(laws: dict[str, tuple[float, float]], noise: float = 0.01, inference: float = 0.6) -> list[Claim]:
    made = points({TRANSFORMER: laws[TRANSFORMER]}, noise) if TRANSFORMER in laws else []
    others = {model: law for model, law in laws.items() if model != TRANSFORMER}
    return claims(outcome(made + points(others, noise, inference_flops_per_token=inference * 1e6)))


def verdicts(found: list[Claim]) -> list[str]:
    return [one.verdict for one in found]


def test_all_hold() -> None:
    assert verdicts(judged(PAPER)) == [HOLDS] * 6


def test_none_holds() -> None:
    against = {
        TRANSFORMER: (2.0, 0.5),
        calm(1): (2.5, 0.5),
        calm(2): (1.5, 0.4),
        calm(4): (1.0, 0.4),
        calm(8): (1.5, 0.3),
    }
    assert verdicts(judged(against)) == [DOES_NOT] * 6


def test_noise_cannot_tell() -> None:
    same = dict.fromkeys(PAPER, (2.0, 0.45))
    assert verdicts(judged(same, noise=0.3))[1:] == [CANNOT] * 5


def test_too_few_points_cannot_tell() -> None:
    found = claims(outcome(points(PAPER)[:1]))
    assert verdicts(found) == [CANNOT] * 6
    assert all("too few points, or scores above 0" in one.evidence for one in found)
    assert verdicts(claims(outcome([]))) == [CANNOT] * 6


def test_inference_has_to_be_saved_too() -> None:
    assert judged(PAPER, inference=0.67)[0].verdict == DOES_NOT
    assert "inference -33\N{NO-BREAK SPACE}% [" in judged(PAPER, inference=0.67)[0].evidence


def test_widths_within_noise_leave_inference_open() -> None:
    made = points({TRANSFORMER: PAPER[TRANSFORMER]}) + points({calm(4): PAPER[calm(4)]}, inference_flops_per_token=6e5)
    largest = [one for one in made if one.budget == BUDGETS[-1]]

    def with_width(share: float) -> Claim:
        # Of both models, at the largest budget: one of twice the width and the FLOPs, one that is half as dear.
        others = [
            point(
                one.model,
                one.budget,
                share * one.scores["brierlm"],
                width,
                inference_flops_per_token=times * one.inference_flops_per_token,
            )
            for one in largest
            for width, times in ((256, 2.0), (64, 0.5))
        ]
        return claims(outcome(made + others))[0]

    assert with_width(0.9).verdict == HOLDS
    assert "-40\N{NO-BREAK SPACE}% [-40\N{NO-BREAK SPACE}%, -40" in with_width(0.9).evidence
    close = with_width(0.99)
    assert close.verdict == CANNOT
    # 0.5 * 0.6 / 2 and 2 * 0.6 / 0.5 of the Transformer's.
    assert "-40\N{NO-BREAK SPACE}% [-85\N{NO-BREAK SPACE}%, +140\N{NO-BREAK SPACE}%]" in close.evidence
    assert (
        "the best width may be 64 or 128 or 256 of CALM, K = 4 and 64 or 128 or 256 of the Transformer"
        in close.evidence
    )


def test_saving_at_equal_quality() -> None:
    # 2 (x / 1e13)^0.5 against 1 (x / 1e13)^0.5: a quarter of the FLOPs.
    found = outcome(points({calm(4): (2.0, 0.5), TRANSFORMER: (1.0, 0.5)}, noise=0.0)).fits["brierlm"]
    ours, theirs = found[calm(4)], found[TRANSFORMER]
    assert ours is not None
    assert theirs is not None
    assert training_saving(ours, theirs, 0.0).estimate == pytest.approx(0.75)
    # With an autoencoder as dear as half of the largest budget, and the other way round.
    assert training_saving(ours, theirs, BUDGETS[-1] / 2).estimate == pytest.approx(0.25)
    assert training_saving(theirs, ours, 0.0).estimate == pytest.approx(-3.0)


def test_the_autoencoder_is_charged() -> None:
    made = points({TRANSFORMER: (1.0, 0.5)}, 0.001) + points(
        {calm(4): (1.5, 0.5)}, 0.001, autoencoder_flops=BUDGETS[-2]
    )
    # At the largest budget half is left for CALM: 1.5 * sqrt(1/2) = 1.06 of the Transformer's score.
    (best,) = [one for one in claims(outcome(made)) if "best frontier" in one.claim]
    assert "1.06 [" in best.evidence


def test_the_best_width_counts() -> None:
    made = points({TRANSFORMER: (2.0, 0.4), calm(4): (1.0, 0.4)})
    wide = [point(calm(4), budget, 4.0 * (budget / 1e13) ** 0.4, hidden_size=256) for budget in BUDGETS]
    (best,) = [one for one in claims(outcome(made + wide)) if "best frontier" in one.claim]
    assert "2.0" in best.evidence.rsplit(";", 1)[1]


@pytest.mark.parametrize(
    ("model", "open_claims"), [(calm(8), [2, 3, 4]), (calm(4), [2, 3, 4]), (calm(2), [4]), (calm(1), [4, 5])]
)
def test_an_autoencoder_that_loses_tokens_leaves_claims_about_k_open(model: str, open_claims: list[int]) -> None:
    made = points(PAPER, 0.01)
    made = [replace(one, inference_flops_per_token=6e5) if one.model == calm(4) else one for one in made]

    def found(share: float) -> list[Claim]:
        return claims(outcome([
            replace(one, scores=one.scores | {"token_accuracy": share if one.model == model else 0.999})
            if one.model != TRANSFORMER else one for one in made
        ]))  # fmt: skip

    assert verdicts(found(0.991)) == [HOLDS] * 6
    assert [number for number, one in enumerate(found(0.989)) if one.verdict == CANNOT] == open_claims
    assert all("98.9\N{NO-BREAK SPACE}%" in found(0.989)[number].evidence for number in open_claims)


def test_verdict_is_about_the_interval() -> None:
    assert verdict(Interval(0.5, 0.44, 0.6), 0.44) == HOLDS
    assert verdict(Interval(0.4, 0.3, 0.439), 0.44) == DOES_NOT
    assert verdict(Interval(0.5, 0.43, 0.6), 0.44) == CANNOT
    assert verdict(Interval(-math.inf, -math.inf, -1.0)) == DOES_NOT
    assert all_of([HOLDS, HOLDS]) == HOLDS
    assert all_of([HOLDS, CANNOT]) == CANNOT
    assert all_of([CANNOT, DOES_NOT]) == DOES_NOT
    assert all_of([]) == CANNOT
