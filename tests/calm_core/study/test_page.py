"""The page at every stage of a study: nothing done, one point, some missing and failed, all."""

import re
from dataclasses import replace

import pytest

from calm_core.study.claims import CANNOT
from calm_core.study.figures import inference_budget
from calm_core.study.outcome import outcome
from calm_core.study.page import crossing_sentence, power, render_study
from calm_core.study.point import TRANSFORMER, Point, calm
from calm_core.study.power_law import Crossing, Interval
from tests.calm_core.study.made_up import BUDGETS, points

FACTS = {"processor": "<fast> & cool"}


def study() -> list[Point]:
    return points({TRANSFORMER: (2.0, 0.4), calm(4): (1.5, 0.5), calm(8): (1.0, 0.5)}, autoencoder_flops=3e12)


def test_all_of_it() -> None:
    page = render_study(study(), FACTS)
    assert page.count("<svg") == 3
    assert "&lt;fast&gt; &amp; cool" in page
    # Nothing is loaded from elsewhere.
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)
    assert "CALM, K = 8" in page
    assert "Where the curves cross" in page
    assert "two seeds or more: none here has" in page
    twice = study() + [replace(one, seed=1) for one in study()]
    assert "two seeds or more." in render_study(twice, FACTS)


@pytest.mark.slow
def test_the_same_points_give_the_same_page() -> None:
    assert render_study(study(), FACTS) == render_study(study(), FACTS)


@pytest.mark.parametrize("done", [0, 1])
def test_a_study_that_has_only_begun(done: int) -> None:
    made = study()
    page = render_study(made[:done] + [replace(one, state="planned", scores={}) for one in made[done:]], FACTS)
    assert page.count(f">{CANNOT}<") == 6
    assert f"{done} of {len(made)} trainings are done" in page
    assert page.count("<svg") == (3 if done else 0)


def test_failed_and_missing_points_and_measures() -> None:
    made = study()
    made[2] = replace(made[2], state="failed", scores={})
    made[9] = replace(made[9], state="planned", scores={})
    made[17] = replace(made[17], scores={k: v for k, v in made[17].scores.items() if k != "bits_per_byte"})
    page = render_study(made, FACTS)
    assert "1 failed" in page
    assert page.count('class="failed">failed') == 1
    # No bits a byte at all, and scores that cannot be told from 0.
    bare = [replace(one, scores={"brierlm": 0.0, "brierlm_low": 0.0, "brierlm_high": 0.1}) for one in made]
    assert "not measured" in render_study(bare, FACTS)


def test_models_without_an_autoencoder_are_charged_none() -> None:
    page = render_study([replace(one, autoencoder_flops=0.0) for one in study()], FACTS)
    assert page.count("<svg") == 2
    assert "autoencoder" not in page.replace("<th>autoencoder</th>", "")
    assert "Bits a byte are exact" in page
    assert "Where the curves cross" in page


def test_the_share_of_tokens_that_is_rebuilt() -> None:
    made = study()
    assert render_study(made, FACTS).count("<td>not recorded</td>") == 2
    known = [
        replace(one, scores=one.scores | {"token_accuracy": 0.98765}) if one.model == calm(8) else one for one in made
    ]
    page = render_study(known, FACTS)
    assert "<td>98.77 %</td>" in page
    assert page.count("<td>not recorded</td>") == 1


def test_it_says_which_points_have_intervals() -> None:
    made = study()
    assert f"For bits a byte {len(made)} of {len(made)} points have no interval" in render_study(made, FACTS)
    ends = {"bits_per_byte_low": 1.9, "bits_per_byte_high": 2.2}
    page = render_study([replace(one, scores=one.scores | ends) for one in made], FACTS)
    assert "have no interval" not in page
    assert page.count("2.000 [1.900, 2.200]") == len(made)


INFINITY = float("inf")


def told(estimate: float, low: float, high: float, **shares: float) -> str:
    """The sentence about budgets from 1e12 to 1e14, where by all draws CALM gains more and is behind."""
    where = (
        "never" if estimate == INFINITY else "ahead" if estimate < 1e12 else "within" if estimate <= 1e14 else "beyond"
    )
    found = Crossing(Interval(estimate, low, high), where, 1e12, 1e14, 1.0, 1.0, 0.0, 0.0)  # type: ignore[arg-type]
    return crossing_sentence(calm(4), TRANSFORMER, found._replace(**shares))  # type: ignore[arg-type]


def test_sentences_about_crossings_where_draws_agree() -> None:
    assert told(5e13, 1e13, 2e14) == "CALM, K = 4 overtakes the Transformer at 5.00e13 FLOPs [1.00e13, 2.00e14]."
    assert (
        told(5e15, 1e15, 9e16)
        == "CALM, K = 4 is behind; extrapolated, the fits meet at 5.00e15 FLOPs [1.00e15, 9.00e16]."
    )
    assert "do not meet within 1,000 times" in told(5e18, 2e17, INFINITY)
    assert "is ahead at every budget" in told(1e11, 1e9, 9e11, ahead_throughout=0.96, ahead_at_the_end=1.0)
    never = {"estimate": INFINITY, "low": INFINITY, "high": INFINITY}
    assert "gains less from scale than the Transformer; CALM, K = 4 is behind" in told(**never, gains_more=0.04)
    assert "; CALM, K = 4 is ahead at" in told(**never, gains_more=0.04, ahead_at_the_end=0.96)
    assert "either may be ahead at the largest budget" in told(**never, gains_more=0.04, ahead_at_the_end=0.5)
    # Two models that fall with scale: which falls the faster is no question of gains.
    falls = told(**never, gains=0.0, gains_more=1.0)
    assert "gains nothing from scale" in falls
    assert "gains less" not in falls


@pytest.mark.parametrize(
    ("back", "sentence"),
    [
        (
            Crossing(Interval(5e13, 1e13, 2e14), "within", 1e12, 1e14, 1.0, 1.0, 0.0, 1.0),
            "CALM, K = 4 gains less from scale than the Transformer, which overtakes it at 5.00e13 FLOPs [1.00e13, "
            "2.00e14]; CALM, K = 4 is behind at the largest budget.",
        ),
        (
            Crossing(Interval(5e15, 1e15, 9e16), "beyond", 1e12, 1e14, 1.0, 1.0, 0.0, 1.0),
            "CALM, K = 4 gains less from scale than the Transformer, which, extrapolated, overtakes it at 5.00e15 "
            "FLOPs [1.00e15, 9.00e16]; CALM, K = 4 is behind at the largest budget.",
        ),
    ],
)
def test_the_baseline_may_overtake(back: Crossing, sentence: str) -> None:
    never = Crossing(Interval(INFINITY, INFINITY, INFINITY), "never", 1e12, 1e14, 1.0, 0.04, 0.0, 0.0)
    assert crossing_sentence(calm(4), TRANSFORMER, never, back) == sentence
    # Ahead throughout, or nobody knows where: then the exponents alone speak.
    for other in (back._replace(where="ahead"), back._replace(flops=Interval(5e13, 1e13, INFINITY))):
        assert crossing_sentence(calm(4), TRANSFORMER, never, other).startswith("No crossing after which")


def test_a_page_says_where_the_baseline_overtakes() -> None:
    # 2 (FLOPs / 1e13)^0.2 against 1.6 (FLOPs / 1e13)^0.4 meet at 3.1e13.
    made = points({TRANSFORMER: (1.6, 0.4), calm(4): (2.0, 0.2)}, autoencoder_flops=0.0)
    assert "which overtakes it at" in render_study(made, FACTS)


@pytest.mark.parametrize(
    ("flops", "shares", "end"),
    [
        ((INFINITY, 2e13, INFINITY), {"gains_more": 0.3}, "more than 1.00e17 FLOPs [2.00e13, no upper end]."),
        (
            (1e11, 1e3, 5e13),
            {"ahead_throughout": 0.8, "ahead_at_the_end": 0.9},
            "1.00e11 FLOPs [no lower end, 5.00e13].",
        ),
        ((5e13, 1e13, INFINITY), {"gains_more": 0.9}, "5.00e13 FLOPs [1.00e13, no upper end]."),
        ((5e15, 5e13, INFINITY), {"gains_more": 0.9}, "5.00e15 FLOPs [5.00e13, no upper end]."),
        ((5e15, 5e13, 9e15), {"ahead_at_the_end": 0.2}, "5.00e15 FLOPs [5.00e13, 9.00e15]."),
        ((5e18, 5e13, INFINITY), {}, "more than 1.00e17 FLOPs [5.00e13, no upper end]."),
    ],
)
def test_sentences_about_crossings_where_draws_differ(
    flops: tuple[float, float, float], shares: dict[str, float], end: str
) -> None:
    sentence = told(*flops, **shares)
    assert sentence.startswith("Cannot be told: ")
    assert sentence.endswith(f", and the fits meet at {end}")


def test_numbers_of_flops() -> None:
    assert [power(value) for value in (5.24e11, 2.5e11, float("inf"))] == ["5.24e11", "2.50e11", "∞"]


def test_inference_is_compared_where_there_are_widths() -> None:
    narrow = [replace(one, hidden_size=64) for one in study() if one.budget <= BUDGETS[3]]
    assert inference_budget(outcome(study() + narrow).measured) == BUDGETS[3]
    # Two of three models are enough, one is not; without any other width it is the largest budget.
    assert inference_budget(outcome(study() + narrow[1:]).measured) == BUDGETS[3]
    assert inference_budget(outcome(study() + narrow[:4]).measured) == BUDGETS[-1]
    assert inference_budget(outcome(study()).measured) == BUDGETS[-1]
    assert inference_budget(outcome(study()[:-1]).measured) == BUDGETS[-2]
