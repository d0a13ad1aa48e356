"""The plan of params.yaml itself, at stated speeds: which points, how large, how long."""

import itertools
import math
from pathlib import Path

import pytest

from calm_core.errors import CalmError
from calm_core.params import Params, load_params, parse_params
from calm_core.storage.yaml_io import read_yaml
from calm_core.study.plan import CORE_BUDGETS, FEWEST_STEPS, POINT_SECONDS, Rates, plan_study
from calm_core.study.point import TRANSFORMER, Point, calm
from flows.study import HOURS, SMALLEST_BUDGET
from flows.workspaces import apply_overrides
from tests import ROOT

RATES = Rates(8.3e10, {1: 8e10, 2: 1e11, 4: 1.26e11, 8: 1.2e11})
"""Of two cores, about."""

MODELS = {TRANSFORMER, calm(1), calm(2), calm(4), calm(8)}


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def plan(params: Params, hours: float = HOURS, speed: float = 1.0, seeds: int = 1) -> list[Point]:
    rates = Rates(speed * RATES.transformer, {size: speed * rate for size, rate in RATES.calm.items()})
    return plan_study(params, rates, hours, SMALLEST_BUDGET, [4, 2, 8, 1], [1.0, 0.5, 2.0], seeds)


def budgets(points: list[Point]) -> list[float]:
    return sorted({point.budget for point in points})


def test_default_hours_cover_two_decades_in_factors_of_two(params: Params) -> None:
    points = plan(params)
    found = budgets(points)
    assert found[-1] / found[0] >= 100
    assert [later / one for one, later in itertools.pairwise(found)] == [2.0] * (len(found) - 1)
    for budget in found:
        assert {
            point.model for point in points if point.budget == budget and point.hidden_size == params.calm.hidden_size
        } == MODELS
    assert [point.budget for point in points] == sorted(point.budget for point in points)


@pytest.mark.parametrize("hours", [1.0, HOURS, 12.0])
def test_the_planned_time_fits(params: Params, hours: float) -> None:
    points = plan(params, hours)
    assert sum(point.planned_seconds for point in points) <= 3600 * hours
    # Each point takes at least what its training does, and the first of a K its autoencoder's as well.
    trained: set[str] = set()
    for point in points:
        rate = RATES.transformer if point.model == TRANSFORMER else RATES.calm[int(point.model.removeprefix("calm-"))]
        own = point.training_flops + (0 if point.model in trained else point.autoencoder_flops)
        assert point.planned_seconds > own / rate
        trained.add(point.model)


def test_more_hours_never_remove_a_point(params: Params) -> None:
    known: set[tuple[str, ...]] = set()
    for hours in (1.0, 3.0, 12.0):
        points = {tuple(point.overrides) for point in plan(params, hours)}
        assert points > known
        known = points


def test_other_widths_are_where_they_may_be_the_best(params: Params) -> None:
    of_width: dict[int, set[float]] = {}
    for point in plan(params, 24.0):
        of_width.setdefault(point.hidden_size, set()).add(point.budget)
    own = params.calm.hidden_size
    narrow, core, wide = of_width[own // 2], of_width[own], of_width[2 * own]
    largest = SMALLEST_BUDGET * 2 ** (CORE_BUDGETS - 1)
    assert len(narrow) == CORE_BUDGETS / 2
    # A factor of two between the widest of narrow models and the narrowest of wide ones.
    assert 2 * max(narrow) == min(wide)
    assert max(core) > largest
    assert max(wide) in (max(core), max(core) / 2)
    # The first of a wide model is at the largest of the core budgets.
    first = next(
        hours for hours in range(1, 24) if any(one.hidden_size == 2 * own for one in plan(params, float(hours)))
    )
    assert largest in {one.budget for one in plan(params, float(first)) if one.hidden_size == 2 * own}


def test_a_faster_machine_gets_a_decade_more(params: Params) -> None:
    assert budgets(plan(params, speed=100))[-1] >= 10 * budgets(plan(params))[-1]


def test_steps_make_the_budget_within_half_a_step(params: Params) -> None:
    for point in plan(params, 12.0):
        settings = dict(override.split("=") for override in point.overrides)
        name = TRANSFORMER if point.model == TRANSFORMER else "calm"
        steps = int(settings[f"{name}.steps"])
        assert abs(point.training_flops - point.budget) <= point.training_flops / steps / 2
        batch = int(settings[f"{name}.batch_sequences"])
        assert steps >= FEWEST_STEPS - 1 or batch == 1
        section = getattr(params, name)
        rate = float(settings[f"{name}.muon_learning_rate"])
        assert rate == pytest.approx(section.muon_learning_rate * math.sqrt(batch / section.batch_sequences), rel=1e-5)
        assert point.training_tokens == steps * batch * 256
        assert settings[f"{name}.schedule"] == "linear"
        assert int(settings[f"{name}.warmup_steps"]) == pytest.approx(0.07 * steps, abs=0.5)


def test_points_are_valid_params_and_leave_the_other_model_alone(params: Params, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for point in plan(params, 12.0)[:15:2]:
        path.write_text((ROOT / "params.yaml").read_text())
        apply_overrides(path, point.overrides)
        changed = parse_params(read_yaml(path))
        same = (changed.calm == params.calm, changed.transformer == params.transformer)
        assert same == (point.model == TRANSFORMER, point.model != TRANSFORMER)
        section = changed.transformer if point.model == TRANSFORMER else changed.calm
        assert section.hidden_size // section.heads == params.calm.hidden_size // params.calm.heads
        assert changed.autoencoder.steps == params.autoencoder.steps
        if point.model != TRANSFORMER:
            assert point.model == calm(changed.autoencoder.patch_size)


def test_an_autoencoder_is_charged_to_those_that_need_it(params: Params) -> None:
    for head, needed in (("tokens", False), ("energy", True)):
        points = plan(params.model_copy(update={"calm": params.calm.model_copy(update={"head": head})}))
        assert {point.model for point in points if point.autoencoder_flops} == (
            MODELS - {TRANSFORMER} if needed else set()
        )


def test_a_token_head_is_as_wide_as_its_backbone(params: Params) -> None:
    sizes = set()
    for point in plan(params, 12.0):
        if point.model != TRANSFORMER:
            settings = dict(override.split("=") for override in point.overrides)
            sizes.add((point.hidden_size, int(settings["calm.token_hidden_size"])))
    size = params.calm.hidden_size
    assert sizes == {(size // 2, size // 2), (size, size), (2 * size, 2 * size)}


def test_seeds_repeat_each_point(params: Params) -> None:
    points = plan(params, 12.0, seeds=3)
    seeds = {(point.model, point.hidden_size, point.budget): set() for point in points}
    for point in points:
        seeds[point.model, point.hidden_size, point.budget].add(point.seed)
    assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}


def test_what_cannot_be_planned(params: Params) -> None:
    with pytest.raises(CalmError, match=r"hours is 0\.01; the smallest budget"):
        plan(params, 0.01)
    with pytest.raises(CalmError, match="seeds is 0"):
        plan(params, seeds=0)
    with pytest.raises(CalmError, match="hours is nan"):
        plan(params, math.nan)
    with pytest.raises(CalmError, match="K is 3; calm.context_tokens 256"):
        plan_study(params, RATES, 3.0, 1e12, [3], [1.0], 1)


def test_each_model_is_planned_at_its_own_speed(params: Params) -> None:
    slower = RATES._replace(calm=RATES.calm | {8: RATES.calm[8] / 2})
    seconds: dict[str, list[float]] = {}
    for rates in (RATES, slower):
        for point in plan_study(params, rates, 3.0, 1e13, [4, 8], [1.0], 1):
            if point.budget == 2e13:
                seconds.setdefault(point.model, []).append(point.planned_seconds - POINT_SECONDS)
    assert seconds[calm(8)][1] == pytest.approx(2 * seconds[calm(8)][0])
    assert [seconds[model][0] for model in (TRANSFORMER, calm(4))] == [seconds[TRANSFORMER][1], seconds[calm(4)][1]]
