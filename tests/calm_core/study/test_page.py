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


def test_it_says_which_points_have_intervals() -> None:
    made = study()
    assert f"For bits a byte {len(made)} of {len(made)} points have no interval" in render_study(made, FACTS)
    ends = {"bits_per_byte_low": 1.9, "bits_per_byte_high": 2.2}
    page = render_study([replace(one, scores=one.scores | ends) for one in made], FACTS)
    assert "have no interval" not in page
    assert page.count("2.000 [1.900, 2.200]") == len(made)


def test_sentences_about_crossings() -> None:
    def told(where: str, estimate: float, high: float = 2e14, ahead: bool = False) -> str:
        flops = Interval(estimate, 1e13, high)
        return crossing_sentence(calm(4), TRANSFORMER, Crossing(flops, where), 1e14, ahead)  # type: ignore[arg-type]

    assert told("within", 5e13) == "CALM, K = 4 overtakes the Transformer at 5.00e13 FLOPs [1.00e13, 2.00e14]."
    assert "no upper end" in told("beyond", 5e15, float("inf"))
    assert "extrapolated" in told("beyond", 5e15)
    assert "do not meet within 1,000 times" in told("beyond", 5e18)
    assert "is ahead at every budget" in told("ahead", 1e11)
    assert told("never", float("inf")).startswith("No crossing: CALM, K = 4 is behind")
    assert "is ahead at the largest" in told("never", float("inf"), ahead=True)


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
