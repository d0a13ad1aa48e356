"""Where a repetition under another seed works, and the CALM of a preset beside it, and under which params."""

from pathlib import Path

import pytest

from calm_core.errors import CalmError
from calm_core.params import Params, load_params, parse_params
from stages import check_params
from stages.runner.places import RUN, Places, asked_places
from tests import ROOT


@pytest.fixture()
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def test_a_run_works_in_the_projects_own_folders(params: Params) -> None:
    assert asked_places([]) == RUN
    assert (RUN.models, RUN.latents, RUN.results) == (Path("models"), Path("data/latents"), Path("results"))
    assert RUN.autoencoder == Path("models/autoencoder")
    assert RUN.scores("calm") == Path("results/scores/calm")
    assert RUN.stage("train_calm") == "train_calm"
    assert RUN.params(params) is params


def test_a_repetition_has_folders_and_a_seed_of_its_own(params: Params) -> None:
    places = asked_places(["--seed", "12"])
    assert places == Places(12)
    assert (places.models, places.latents) == (Path("repeats/12/models"), Path("repeats/12/data/latents"))
    assert places.autoencoder == Path("repeats/12/models/autoencoder")
    assert places.results == Path("repeats/12/results")
    assert places.scores("calm") == Path("results/scores/calm-seed-12")
    assert places.stage("train_calm") == "repeat_train_calm@12"
    # Valid as a whole, since what trains under them validates them again.
    asked = params.model_copy(update={"evaluation": params.evaluation.model_copy(update={"seeds": [12, 13]})})
    repeated = parse_params(places.params(asked).model_dump())
    assert (repeated.seed, repeated.evaluation.seeds) == (12, [])
    assert repeated.calm == params.calm


@pytest.fixture()
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of presets, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    return tmp_path / "presets"


def with_beside(params: Params, *names: str) -> Params:
    return params.model_copy(update={"evaluation": params.evaluation.model_copy(update={"beside": list(names)})})


@pytest.mark.parametrize("seed", [None, 12])
def test_a_calm_beside_has_folders_of_its_own_and_the_latents_of_its_seed(
    params: Params, presets: Path, seed: int | None
) -> None:
    (presets / "fewer.v2.yaml").write_text("calm:\n  samples: 3\n  head: flow\n", encoding="utf-8")
    check_params.main(with_beside(params, "fewer.v2"))
    asked = ["--preset", "fewer.v2", *([] if seed is None else ["--seed", str(seed)])]
    places, of_seed = asked_places(asked, of_calm=True), Places(seed)
    assert places == Places(seed, "fewer.v2")
    own = Path("beside/fewer.v2") / ("" if seed is None else "12")
    assert (places.models, places.results) == (own / "models", own / "results")
    assert (places.autoencoder, places.latents) == (of_seed.autoencoder, of_seed.latents)
    ending = "" if seed is None else "-seed-12"
    assert places.scores("calm") == Path(f"results/scores/calm-fewer.v2{ending}")
    named = "beside_train_calm@fewer.v2" if seed is None else "repeat_beside_train_calm@fewer.v2-12"
    assert places.stage("train_calm") == named
    # All else is of params.yaml.
    found = parse_params(places.params(params).model_dump())
    assert (found.calm.samples, found.calm.head) == (3, "flow")
    assert found.seed == (params.seed if seed is None else 12)
    unchanged = {"calm": params.calm, "seed": params.seed, "evaluation": params.evaluation}
    assert found.model_copy(update=unchanged) == params
    assert found.calm.model_copy(update={"samples": 4, "head": params.calm.head}) == params.calm


@pytest.mark.parametrize(
    ("overlay", "online", "message"),
    [
        (
            "autoencoder:\n  patch_size: 2\ncalm:\n  samples: 3\n",
            False,
            "one changes autoencoder; .* calm alone",
        ),
        ("seed: 3\n", False, "preset one changes seed;"),
        ("calm:\n  samples: 1\n", False, "preset one: calm.samples is 1"),
        ("calm:\n  unheard: 1\n", False, "preset one: calm.unheard is unknown"),
        ("calm:\n  context_tokens: 255\n", False, "does not divide calm.context_tokens 255"),
        ("calm:\n  latents: encoded\n", True, "preset one has calm.latents: encoded, but params.yaml online"),
    ],
)
def test_a_preset_that_cannot_stand_beside_a_run_is_told_before_any_training(
    params: Params, presets: Path, overlay: str, online: bool, message: str
) -> None:
    (presets / "one.yaml").write_text(overlay, encoding="utf-8")
    calm = params.calm.model_copy(update={"latents": "online" if online else "encoded"})
    with pytest.raises(CalmError, match=message) as raised:
        check_params.main(with_beside(params.model_copy(update={"calm": calm}), "one"))
    assert "\n" not in str(raised.value)
    assert not Path("data").exists()


def test_a_preset_that_is_missing_is_told_with_those_there_are(params: Params, presets: Path) -> None:
    (presets / "one.yaml").write_text("calm:\n  samples: 3\n", encoding="utf-8")
    with pytest.raises(CalmError, match="preset 'two' is unknown; there are: one"):
        check_params.main(with_beside(params, "one", "two"))


def test_presets_of_online_latents_need_nothing_on_disk(params: Params, presets: Path) -> None:
    (presets / "one.yaml").write_text("calm:\n  latents: online\n", encoding="utf-8")
    check_params.main(with_beside(params, "one"))
    assert Places(preset="one").params(params).calm.latents == "online"


def test_what_a_preset_says_itself_may_change_in_params_and_what_it_leaves_may_not(
    params: Params, presets: Path
) -> None:
    (presets / "one.yaml").write_text("calm:\n  samples: 3\n", encoding="utf-8")
    section = Path("data/beside/one.json")

    def content(**changes: object) -> bytes:
        check_params.main(
            with_beside(params.model_copy(update={"calm": params.calm.model_copy(update=changes)}), "one")
        )
        return section.read_bytes()

    before = content()
    assert content(samples=7) == before
    assert content(alpha=0.5) != before
    # Those of presets that are not asked for any more go.
    check_params.main(with_beside(params))
    assert list(section.parent.iterdir()) == []
    with pytest.raises(CalmError, match="one.json is missing; `dvc repro` makes it"):
        Places(preset="one").params(params)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (["a", "b", "a"], "each preset belongs there once"),
        (["../a"], "evaluation.beside.0 is '../a'"),
        (["a", ".a"], "evaluation.beside.1 is '.a'"),
        (["a\n"], "evaluation.beside.0 is"),
        (["ä"], "evaluation.beside.0 is 'ä'"),
        ([""], "evaluation.beside.0 is ''"),
        ([f"a{number}" for number in range(21)], "at most 20"),
        (["seed-3"], "beside has seed-3, which would be a repetition's name"),
        (["a", "a-seed-3"], "beside has a-seed-3, which would be a repetition's name"),
    ],
)
def test_names_of_presets_beside_make_folders_that_do_not_meet(params: Params, beside: list[str], message: str) -> None:
    values = params.model_dump()
    values["evaluation"]["beside"] = beside
    with pytest.raises(CalmError, match=message):
        parse_params(values)


def test_names_keep_their_order(params: Params) -> None:
    values = params.model_dump()
    values["evaluation"]["beside"] = ["b", "a", "1.5", "seed-x", "x-seeds-1"]
    assert parse_params(values).evaluation.beside == ["b", "a", "1.5", "seed-x", "x-seeds-1"]


@pytest.mark.parametrize("seeds", [[1, 1], [0], [2, 0, 3]])
def test_seeds_differ(params: Params, seeds: list[int]) -> None:
    values = params.model_dump() | {"seed": 0}
    values["evaluation"]["seeds"] = seeds
    with pytest.raises(Exception, match="evaluation.seeds has [01] twice, or it is the run's own seed"):
        parse_params(values)


@pytest.mark.parametrize("of_calm", [False, True])
@pytest.mark.parametrize(
    "arguments", [["--seed"], ["--seed", "x"], ["1"], ["--preset"], ["--preset", "../presets/one"], ["--preset", "two"]]
)
def test_an_unknown_command_line_is_refused(
    arguments: list[str], of_calm: bool, presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (presets / "two.yaml").touch()
    with pytest.raises(SystemExit) as ended:
        asked_places(arguments, of_calm)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_only_stages_of_calm_have_presets(params: Params, presets: Path) -> None:
    (presets / "one.yaml").write_text("calm: {}\n", encoding="utf-8")
    check_params.main(with_beside(params, "one"))
    assert asked_places(["--preset", "one"], of_calm=True) == Places(preset="one")
    with pytest.raises(SystemExit):
        asked_places(["--preset", "one"])
