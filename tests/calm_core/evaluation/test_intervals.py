"""Intervals of BrierLM over documents and seeds, against scipy, all draws of a bootstrap, and simulated texts."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch

from calm_core.evaluation.brier import by_document, per_document
from calm_core.evaluation.intervals import estimate_brierlm, estimate_difference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frame_of(document: torch.Tensor, scores: torch.Tensor) -> pl.DataFrame:
    return by_document(per_document(document, torch.zeros_like(document), scores))


def scored(means: np.ndarray, documents: Sequence[int] | None = None) -> pl.DataFrame:
    """A frame of documents of ten positions with mean scores ``means`` [documents, 4]."""
    numbers = np.arange(len(means)) if documents is None else np.asarray(documents)
    columns = {f"brier_{n + 1}": 10 * means[:, n] for n in range(4)}
    return pl.DataFrame({"document": numbers, "positions": np.full(len(means), 10), **columns})


def alike(scores: Sequence[float]) -> list[pl.DataFrame]:
    """For each of ``scores`` a seed whose documents all have it: BrierLM is that score, and documents add nothing."""
    return [scored(np.full((5, 4), score / 100)) for score in scores]


def test_documents_are_drawn_and_not_positions() -> None:
    # A document repeats one value at all its positions, so the interval must be that of documents, not of positions.
    values = 0.1 + 0.05 * torch.randn(400, generator=generator())
    document = torch.arange(400).repeat_interleave(50)
    frame = frame_of(document, values[document][:, None].expand(-1, 4).clone())
    assert len(frame) == 400
    result = estimate_brierlm([frame], 2000, generator(1))
    assert (result.positions, result.documents) == (20_000, 400)
    assert result.brierlm == pytest.approx(100 * values.mean().item(), rel=1e-5)
    half_width = 1.96 * 100 * values.std().item() / math.sqrt(400)
    low, high = result.brierlm_ci95
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.1)
    assert (high + low) / 2 == pytest.approx(result.brierlm)


def test_draws_come_from_the_generator_alone() -> None:
    frame = frame_of(torch.arange(30), torch.rand(30, 4, generator=generator()))
    first, again, other = (estimate_brierlm([frame], 10, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.brierlm_ci95 != other.brierlm_ci95


def test_the_bootstrap_against_all_its_draws() -> None:
    # Four documents, so 256 draws of four: the interval is t times their standard deviation, which is that of draws
    # around the mean of the four, a third of the variance short. One document has two thirds of the text, so that they
    # know as much as two would: 60^2 / (5^2 + 40^2 + 2^2 + 13^2) = 2.002.
    positions = torch.tensor([5, 40, 2, 13])
    means = torch.tensor([[0.5, 0.3, 0.2, 0.1], [0.3, 0.2, 0.1, 0.05], [0.9, 0.8, 0.7, 0.6], [0.2, 0.1, 0.1, 0.02]])
    document = torch.tensor([3, 7, 8, 20]).repeat_interleave(positions)
    frame = frame_of(document, means.repeat_interleave(positions, dim=0))
    result = estimate_brierlm([frame], 2000, generator(2))

    def pooled(drawn: tuple[int, ...]) -> float:
        total = sum(int(positions[one]) for one in drawn)
        brier = [sum(float(means[one, n]) * int(positions[one]) for one in drawn) / total for n in range(4)]
        return 100 * math.prod(brier) ** 0.25

    draws = [pooled(drawn) for drawn in itertools.product(range(4), repeat=4)]
    assert (result.positions, result.documents) == (60, 4)
    assert result.brierlm == pytest.approx(pooled((0, 1, 2, 3)), rel=1e-6)
    half_width = result.brierlm_ci95[1] - result.brierlm
    freedom = 60**2 / (5**2 + 40**2 + 2**2 + 13**2) - 1
    wanted = scipy.stats.t(freedom).ppf(0.975) * math.sqrt(4 / 3) * np.std(draws)
    assert half_width == pytest.approx(wanted, rel=3 / math.sqrt(2 * 2000))
    # The lower end would be negative, which no BrierLM is.
    assert result.brierlm_ci95[0] == max(0.0, result.brierlm - half_width)


def test_seeds_alone_have_the_interval_of_students_t() -> None:
    scores = [1.31, 1.22, 1.45]
    result = estimate_brierlm(alike(scores), 100, generator())
    error = scipy.stats.sem(scores)
    assert result.brierlm == pytest.approx(np.mean(scores))
    assert result.brierlm_ci95 == pytest.approx(list(scipy.stats.t.interval(0.95, 2, np.mean(scores), error)), rel=1e-6)
    assert result.brier == pytest.approx([np.mean(scores) / 100] * 4)
    assert (result.positions, result.documents) == (50, 5)


@pytest.mark.parametrize("second", [[1.9, 2.4], [1.3, 1.5, 1.2, 1.25]])
def test_a_difference_of_seeds_alone_is_welchs_test(second: list[float]) -> None:
    first = [1.31, 1.22, 1.45]
    found = estimate_difference(alike(first), alike(second), 100, generator())
    welch = scipy.stats.ttest_ind(first, second, equal_var=False)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found.p == pytest.approx(welch.pvalue, rel=1e-6)
    assert found.difference_ci95 == pytest.approx(list(welch.confidence_interval(0.95)), rel=1e-6)


def test_a_difference_is_paired_by_document() -> None:
    ease = np.random.default_rng(0).gamma(2.0, 0.05, (400, 1)) * np.ones(4)
    first, second = scored(ease + 0.01), scored(ease)
    paired = estimate_difference([first], [second], 500, generator())
    assert paired.difference == pytest.approx(1.0, rel=1e-6)
    # What differs between documents is common to both, and cancels; of the two apart it would be some 2 wide.
    assert paired.difference_ci95 == pytest.approx([1.0, 1.0], abs=1e-9)
    assert paired.p < 1e-9
    low, high = estimate_difference([first], [scored(ease[::-1])], 500, generator()).difference_ci95
    assert high - low > 1
    swapped = estimate_difference([second], [first], 500, generator())
    assert swapped.difference == pytest.approx(-1.0, rel=1e-6)


def test_seeds_of_one_model_meet_the_same_documents() -> None:
    # One seed is good where the other is bad: their mean is the same on every document.
    ease = np.random.default_rng(0).uniform(0.0, 0.2, (300, 1)) * np.ones(4)
    both = estimate_brierlm([scored(0.3 + ease), scored(0.5 - ease)], 500, generator())
    alone = estimate_brierlm([scored(0.3 + ease)], 500, generator())
    seeds = scipy.stats.sem([100 * (0.3 + ease.mean()), 100 * (0.5 - ease.mean())])
    assert alone.brierlm_ci95[1] - alone.brierlm > 0.5
    assert both.brierlm_ci95[1] - both.brierlm == pytest.approx(scipy.stats.t(1).ppf(0.975) * seeds, rel=1e-3)


def test_documents_of_one_model_alone_count_there() -> None:
    first, second = scored(np.full((3, 4), 0.5), [1, 4, 6]), scored(np.full((2, 4), 0.25), [4, 5])
    assert estimate_difference([first], [second], 200, generator()).difference == pytest.approx(25)
    nothing = estimate_difference([first], [first], 200, generator())
    assert (nothing.difference, nothing.difference_ci95, nothing.p) == (0, [0, 0], 1)


def test_groups_are_drawn_where_they_are_named() -> None:
    # Each document of three has the same scores: thirty documents know no more than ten.
    means = np.random.default_rng(0).uniform(0.1, 0.3, (10, 4))
    tripled = scored(means.repeat(3, axis=0)).with_columns(pl.Series("group", np.arange(30) // 3 + 5))
    (alone, grouped, apart) = (
        estimate_brierlm([frame], 4000, generator()) for frame in (scored(means), tripled, tripled.drop("group"))
    )
    assert grouped.brierlm == pytest.approx(alone.brierlm)
    assert grouped.brierlm_ci95 == pytest.approx(alone.brierlm_ci95)
    assert (grouped.documents, grouped.groups, apart.groups) == (30, 10, 30)
    assert apart.brierlm_ci95[1] - apart.brierlm < 0.6 * (grouped.brierlm_ci95[1] - grouped.brierlm)
    of_one, of_groups = (
        estimate_difference([frame], [frame.with_columns(pl.col("brier_1") * pl.col("brier_2"))], 4000, generator())
        for frame in (scored(means), tripled)
    )
    assert of_groups.difference_ci95 == pytest.approx(of_one.difference_ci95)
    assert of_groups.p == pytest.approx(of_one.p)


def test_one_group_says_nothing_of_others() -> None:
    one = scored(np.full((3, 4), 0.5)).with_columns(pl.Series("group", [7, 7, 7]))
    assert estimate_brierlm([one], 10, generator()).brierlm_ci95 is None
    found = estimate_difference([one], [one.with_columns(pl.col("brier_1") / 2)], 10, generator())
    assert (found.difference_ci95, found.p) == (None, None)
    # Two seeds say something of a third.
    two = estimate_brierlm([one, one.with_columns(pl.col("brier_4") / 2)], 10, generator())
    assert two.brierlm_ci95[1] > two.brierlm


@pytest.mark.slow
def test_intervals_of_few_groups_of_unequal_size() -> None:
    """Thirteen groups as in the default test split, of which one has a third: what each has in common is drawn."""
    draws, texts = np.random.default_rng(0), 1500
    tokens = np.array([0.9, 1.5, 3.3, 3.3, 4.9, 5.5, 6.5, 7.3, 9.2, 13, 17, 23, 56])
    groups = np.repeat(np.arange(len(tokens)), np.maximum(1, tokens).astype(int))
    mean = np.array([0.30, 0.15, 0.08, 0.05])
    covered = np.zeros(2)
    for _ in range(texts):
        ease, gain = (1 + 0.3 * draws.standard_normal((len(tokens), 1)) for _ in range(2))
        noise = 1 + 0.3 * draws.standard_normal((2, len(groups), 4))
        one, other = (
            scored(mean * of[groups] * noise[number]).with_columns(pl.Series("group", groups))
            for number, of in enumerate((ease, ease + 0.2 * gain))
        )
        random = generator(int(draws.integers(2**31)))
        low, high = estimate_brierlm([one], 200, random).brierlm_ci95
        true = 100 * math.prod(mean) ** 0.25
        covered[0] += low <= true <= high
        low, high = estimate_difference([other], [one], 200, random).difference_ci95
        covered[1] += low <= 0.2 * true <= high
    assert np.all(np.abs(covered / texts - 0.95) < 0.02), covered / texts


def test_a_score_of_zero_is_not_certain() -> None:
    # Brier-4 is below 0 in every draw, so that BrierLM is 0 in all of them.
    means = np.random.default_rng(0).uniform(0.1, 0.3, (40, 4)) - [0, 0, 0, 0.4]
    means[::4, 3] = 0.35
    found = estimate_brierlm([scored(means)], 1000, generator())
    assert (found.brierlm, found.brierlm_ci95[0]) == (0, 0)
    ends = [np.mean(of) + scipy.stats.t(39).ppf(0.975) * scipy.stats.sem(of) for of in means.T]
    wanted = 100 * math.prod(max(0.0, end) for end in ends) ** 0.25
    assert found.brierlm_ci95[1] == pytest.approx(wanted, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_cover_what_they_say(seeds: int) -> None:
    """Of texts and trainings drawn anew, 95 % of the intervals hold what is true of all texts and trainings."""
    draws, texts, documents, resamples = np.random.default_rng(0), 1000, 200, 200
    # Each document has an ease of its own, common to all, each seed a level, each pair of them noise; means are known.
    means = np.array([[0.30, 0.15, 0.08, 0.05], [0.33, 0.16, 0.09, 0.05]])
    levels = 0.03 if seeds > 1 else 0.0
    true = [100 * math.prod(mean) ** 0.25 for mean in means]
    covered = np.zeros(3)
    p_values = []

    def trained(mean: np.ndarray, ease: np.ndarray) -> list[pl.DataFrame]:
        level = 1 + levels * draws.standard_normal(seeds)
        return [scored(mean * ease * one * (1 + 0.3 * draws.standard_normal((documents, 4)))) for one in level]

    for _ in range(texts):
        ease = draws.gamma(4.0, 1 / 4.0, (documents, 1))
        models = [trained(mean, ease) for mean in means]
        random = generator(int(draws.integers(2**31)))
        for model, frames in enumerate(models):
            low, high = estimate_brierlm(frames, resamples, random).brierlm_ci95
            covered[model] += low <= true[model] <= high
        low, high = estimate_difference(*models, resamples, random).difference_ci95
        covered[2] += low <= true[0] - true[1] <= high
        p_values.append(estimate_difference(models[0], trained(means[0], ease), resamples, random).p)
    assert np.all(np.abs(covered / texts - 0.95) < 0.02), covered / texts
    # Of two models that are alike, one in twenty looks different.
    assert abs(np.mean(np.array(p_values) < 0.05) - 0.05) < 0.02, np.mean(np.array(p_values) < 0.05)


REPEATED = """
import polars, torch
from calm_core.evaluation.brier import SCORES
from calm_core.evaluation.intervals import estimate_brierlm

draws, count = torch.Generator().manual_seed(0), 20_000
columns = {
    "document": torch.arange(count),
    "group": torch.arange(count) * 13 // count,
    "positions": torch.randint(1, 9, (count,), generator=draws),
    **{score: torch.rand(count, generator=draws, dtype=torch.float64) for score in SCORES},
}
frame = polars.DataFrame({name: column.numpy() for name, column in columns.items()})
found = {repr(estimate_brierlm([frame], 2, torch.Generator().manual_seed(0))) for _ in range(400)}
print(polars.thread_pool_size(), len(found))
"""


@pytest.mark.slow
def test_a_score_is_the_same_whichever_thread_ends_first() -> None:
    # In a process of its own: tests have one thread of polars, which cannot overtake another.
    threads = {**os.environ, "POLARS_MAX_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", REPEATED], env=threads, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "1"]
