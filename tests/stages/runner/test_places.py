"""Where a repetition under another seed works, and under which params."""

from pathlib import Path

import pytest

from calm_core.params import Params, load_params, parse_params
from stages.runner.places import RUN, Places, asked_places
from tests import ROOT


@pytest.fixture()
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def test_a_run_works_in_the_projects_own_folders(params: Params) -> None:
    assert asked_places([]) == RUN
    assert (RUN.models, RUN.latents, RUN.results) == (Path("models"), Path("data/latents"), Path("results"))
    assert RUN.scores("calm") == Path("results/scores/calm")
    assert RUN.stage("train_calm") == "train_calm"
    assert RUN.params(params) is params


def test_a_repetition_has_folders_and_a_seed_of_its_own(params: Params) -> None:
    places = asked_places(["--seed", "12"])
    assert places == Places(12)
    assert (places.models, places.latents) == (Path("repeats/12/models"), Path("repeats/12/data/latents"))
    assert places.results == Path("repeats/12/results")
    assert places.scores("calm") == Path("results/scores/calm-seed-12")
    assert places.stage("train_calm") == "repeat_train_calm@12"
    # Valid as a whole, since what trains under them validates them again.
    asked = params.model_copy(update={"evaluation": params.evaluation.model_copy(update={"seeds": [12, 13]})})
    repeated = parse_params(places.params(asked).model_dump())
    assert (repeated.seed, repeated.evaluation.seeds) == (12, [])
    assert repeated.calm == params.calm


@pytest.mark.parametrize("seeds", [[1, 1], [0], [2, 0, 3]])
def test_seeds_differ(params: Params, seeds: list[int]) -> None:
    values = params.model_dump() | {"seed": 0}
    values["evaluation"]["seeds"] = seeds
    with pytest.raises(Exception, match="evaluation.seeds has [01] twice, or it is the run's own seed"):
        parse_params(values)


@pytest.mark.parametrize("arguments", [["--seed"], ["--seed", "x"], ["1"]])
def test_an_unknown_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        asked_places(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
