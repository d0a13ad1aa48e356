"""Scores over seeds, frontiers, and what is part of a fit."""

from dataclasses import replace

import pytest
from scipy import stats

from calm_core.study.outcome import among_the_best, frontier, outcome, token_accuracy
from calm_core.study.point import TRANSFORMER, calm
from tests.calm_core.study.made_up import BUDGETS, point, points


def test_seeds_become_one_point_with_an_interval_of_both() -> None:
    scores = [1.0, 1.2, 1.4]
    exact = [
        replace(one, scores=one.scores | {"brierlm_low": score, "brierlm_high": score})
        for seed, score in enumerate(scores)
        for one in [point(TRANSFORMER, 1e12, score, seed=seed)]
    ]
    (one,) = outcome(exact).measured
    assert (one.seeds, one.brierlm.estimate) == (3, pytest.approx(1.2))
    # Without chance from documents: Student's interval of three values.
    low, high = stats.t.interval(0.95, 2, loc=1.2, scale=stats.sem(scores))
    assert (one.brierlm.low, one.brierlm.high) == pytest.approx((low, high), rel=0.1, abs=0.03)
    # Without chance from seeds: the interval of the documents, which are the same ones.
    same = [point(TRANSFORMER, 1e12, 1.0, seed=seed) for seed in range(3)]
    (one,) = outcome(same).measured
    assert (one.brierlm.low, one.brierlm.high) == pytest.approx((0.98, 1.02), abs=0.002)


def test_bits_a_byte_have_the_interval_that_the_point_has() -> None:
    (bare,) = outcome([point(TRANSFORMER, 1e12, 1.0)]).measured
    assert bare.bits_per_byte == (2.0, 2.0, 2.0)
    ends = {"bits_per_byte_low": 1.9, "bits_per_byte_high": 2.2}
    with_ends = [replace(one, scores=one.scores | ends) for one in [point(TRANSFORMER, 1e12, 1.0)]]
    assert outcome(with_ends).measured[0].bits_per_byte == (2.0, 1.9, 2.2)
    # Over seeds that agree it is that of the documents, about the mean.
    two = [replace(with_ends[0], seed=seed) for seed in range(2)]
    assert outcome(two).measured[0].bits_per_byte == pytest.approx((2.0, 1.85, 2.15), abs=0.01)


def test_frontier_has_the_best_width_of_each_budget_by_measure() -> None:
    made = [
        point(calm(4), 2e12, 3.0, 64),
        point(calm(4), 2e12, 2.0, 128),
        point(calm(4), 1e12, 1.0, 64),
        point(calm(4), 1e12, 1.5, 128),
        point(TRANSFORMER, 1e12, 9.0),
    ]
    made[0] = replace(made[0], scores=made[0].scores | {"bits_per_byte": 2.5})
    found = outcome(made).measured
    assert [(one.budget, one.hidden_size) for one in frontier(found, calm(4), "brierlm")] == [(1e12, 128), (2e12, 64)]
    assert [one.hidden_size for one in frontier(found, calm(4), "bits_per_byte")][1] == 128


def test_the_worst_autoencoder_of_a_model_counts() -> None:
    made = [
        replace(one, scores=one.scores | ({"token_accuracy": share} if share else {}))
        for seed, share in enumerate((0.99, 0.97, None))
        for one in [point(calm(4), 1e12, 1.0, seed=seed)]
    ]
    found = outcome([*made, point(calm(4), 2e12, 1.0), point(calm(8), 1e12, 1.0)]).measured
    assert (token_accuracy(found, calm(4)), token_accuracy(found, calm(8))) == (0.97, None)


def test_widths_within_noise_of_the_best() -> None:
    scores = {64: 3.0, 128: 2.9, 256: 2.85}  # each with 2 % to both sides
    made = [point(calm(4), 2e12, score, width) for width, score in scores.items()]
    found = outcome([point(calm(4), 1e12, 9.0, 32), point(TRANSFORMER, 2e12, 3.0, 512), *reversed(made)]).measured
    assert [one.hidden_size for one in among_the_best(found, calm(4))] == [64, 128]
    assert among_the_best(found, calm(2)) == []


def test_scores_that_may_be_0_are_part_of_the_fit() -> None:
    made = points({calm(4): (1.0, 0.5)}, noise=0.0)
    nothing = {"brierlm": 0.0, "brierlm_low": 0.0, "brierlm_high": 0.0}
    unclear = [replace(one, scores=one.scores | nothing) for one in made[:3]]
    law = outcome(unclear + made[3:]).fits["brierlm"][calm(4)]
    assert law is not None
    assert law.points == 8
    assert law.smallest == BUDGETS[0]
    assert law.exponent > 0.5


def test_failed_and_planned_points_are_not_measured() -> None:
    made = points({calm(4): (1.0, 0.5)})
    states = [replace(made[0], state="failed", scores={}), replace(made[1], state="planned"), *made[2:]]
    assert len(outcome(states).measured) == len(made) - 2
    assert outcome([]).measured == []
