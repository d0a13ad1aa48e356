"""A CALM beside the run's own is what that would be under the preset, and touches nothing of it."""

import contextlib
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_core.params import load_params
from calm_core.storage.model_folder import AUTOENCODER
from stages import check_params, digest_corpus, encode_corpus, evaluate_calm, tokenise, train_autoencoder, train_calm
from stages.runner.places import RUN, Places
from stages.runner.resume import folder_of
from stages.runner.run import run_repeatable_stage
from tests.reliability.support.stage_processes import make_project

SEED, PRESET = 7, "more"
OVERLAY = {"samples": 3, "head_blocks": 2, "hidden_size": 8, "steps": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with autoencoders and latents of two seeds, and of the CALMs those of the preset alone."""
    folder = make_project(tmp_path_factory.mktemp("beside") / "project")
    values: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
    for section in ("autoencoder", "calm"):
        values[section].update(steps=3, warmup_steps=1)
    # A head that has the settings of the preset.
    values["calm"].update(checkpoints=3, head="energy", decoder_score=True)
    values["evaluation"].update(tokens=200, likelihood_tokens=100, bootstrap_resamples=100, beside=[PRESET])
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text()[:20_000])
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    (folder / f"presets/{PRESET}.yaml").write_text(yaml.safe_dump({"calm": OVERLAY}))
    with contextlib.chdir(folder):
        params = load_params()
        for stage in (check_params, digest_corpus, tokenise):
            stage.main(params)
        for seed in (None, SEED):
            for stage in (train_autoencoder, encode_corpus):
                stage.main(Places(seed).params(params), Places(seed))
            there = Places(seed, PRESET)
            for stage in (train_calm, evaluate_calm):
                stage.main(there.params(params), there)
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("seed", [None, SEED])
def test_it_is_the_calm_of_a_run_with_the_preset_written_over_params(
    trained: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.chdir(trained)
    there, own = Places(seed, PRESET), Places(seed)
    beside = contents(there.models)
    assert not own.models.joinpath("calm").exists()
    params = load_params()
    written_over = params.model_copy(update={"calm": params.calm.model_copy(update=OVERLAY)})
    for stage in (train_calm, evaluate_calm):
        stage.main(own.params(written_over), own)
    found = contents(own.models)
    assert beside == {name: digest for name, digest in found.items() if name.startswith("calm/")}
    assert contents(there.results) == {
        name: digest for name, digest in contents(own.results).items() if name.startswith("training/calm/")
    }
    for suffix in (".json", ".parquet"):
        scores = [places.scores("calm").with_suffix(suffix).read_bytes() for places in (there, own)]
        assert scores[0] == scores[1]
    # The autoencoder in it is the one that the seed has.
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert found[f"autoencoder/{name}"] == beside[f"calm/{AUTOENCODER}/{name}"]
    # Checkpoints along the training are the run's own alone.
    assert [path.name for path in own.models.joinpath("calm_checkpoints").iterdir()]
    assert [path.name for path in there.models.iterdir()] == ["calm"]


def test_seeds_make_other_models(trained: Path) -> None:
    weights = {
        (trained / root / "models/calm/model.safetensors").read_bytes()
        for root in (f"beside/{PRESET}", f"beside/{PRESET}/{SEED}")
    }
    assert len(weights) == 2


@pytest.mark.parametrize("seed", [None, SEED])
def test_interrupted_work_goes_on_under_the_same_preset_and_inputs_alone(
    trained: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.chdir(trained)
    places = Places(seed, PRESET)

    def folder() -> Path:
        return folder_of(places.stage("train_calm"), places.params(load_params()))

    before = folder()
    assert before == folder()
    others = {folder_of(one.stage("train_calm"), one.params(load_params())) for one in (RUN, Places(SEED))}
    assert before not in others
    section, latents = Path(f"data/beside/{PRESET}.json"), places.latents / "description.json"
    more = {**load_params().calm.model_dump(), **OVERLAY, "samples": 4}
    for path, content in ((section, json.dumps(more)), (latents, "{}")):
        kept = path.read_text()
        path.write_text(content)
        assert folder() != before
        path.write_text(kept)
    assert folder() == before


def test_work_of_a_preset_whose_name_goes_on_is_not_taken_for_ones_own(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    params, places = load_params(), Places(preset=PRESET)
    stage, key = places.stage("train_calm"), "0123456789abcdef"
    (Path(".checkpoints") / f"{stage}-and-more-{key}").mkdir(parents=True)
    folder_of(stage, places.params(params))
    assert "interrupted" not in capsys.readouterr().err
    (Path(".checkpoints") / f"{stage}-{key}").mkdir()
    folder_of(stage, places.params(params))
    assert f"{stage}: .checkpoints keeps 1 interrupted with other params" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
@pytest.mark.parametrize("name", ["train_calm", "evaluate_calm", "train_transformer", "train_autoencoder"])
def test_a_stage_of_calm_alone_takes_a_preset_from_its_command_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(trained)
    asked = ["--seed", str(SEED), "--preset", PRESET]
    monkeypatch.setattr(sys, "argv", [f"stages.{name}", *asked])
    begun: list[Any] = []
    monkeypatch.setattr("stages.runner.run._run_until_the_end", lambda *arguments: begun.append(arguments))
    with contextlib.nullcontext() if name.endswith("calm") else pytest.raises(SystemExit):
        runpy.run_module(f"stages.{name}", run_name="__main__")
    if name.endswith("calm"):
        ((called, _, command),) = begun
        assert called == f"repeat_beside_{name}@{PRESET}-{SEED}"
        # Where a stage works in several processes, each is asked for the same.
        assert command == (["stages.train_calm", *asked] if name == "train_calm" else [])


def test_the_work_of_a_stage_is_given_the_params_and_places_that_are_asked_for(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["stages.train_calm", "--preset", PRESET])
    monkeypatch.setattr("stages.runner.run._run_until_the_end", lambda name, work, command: work(load_params()))
    given: list[Any] = []
    run_repeatable_stage("train_calm", lambda *arguments: given.extend(arguments), of_calm=True)
    assert given == [Places(None, PRESET).params(load_params()), Places(None, PRESET)]
    assert given[0].calm.model_dump() | OVERLAY == given[0].calm.model_dump()
