"""A run that goes on from models of another: their weights are where it begins, their autoencoder stays as it is."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.training import reconstruction
from calm_core.calm.model import Calm
from calm_core.errors import CalmError
from calm_core.params import load_params
from calm_core.report.page import read_curves
from calm_core.storage.checksum import sha256
from calm_core.storage.model_folder import load_model
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages import (
    check_params,
    digest_corpus,
    encode_corpus,
    match_compute,
    tokenise,
    train_autoencoder,
    train_calm,
    train_transformer,
)
from stages.runner.initial import initial_base_model, initial_folder
from stages.runner.resume import folder_of
from tests.reliability.support.stage_processes import make_project
from tests.support.hub_server import hub_on_loopback, use_hub

TRAININGS = (train_autoencoder, encode_corpus, train_calm, train_transformer)
LATENT, TOKENS = "energy", "tokens"
MODELS: tuple[tuple[str, Any], ...] = (("calm", Calm), ("transformer", Transformer))
BASES = {"calm": "someone/base", "transformer": "someone/llama", "autoencoder": "someone/autoencoder"}
"""What given/MODEL was made from; the last is taken by no run, which takes the one in given/calm."""


@pytest.fixture(scope="module", params=[LATENT, TOKENS])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose models lie in given/, and whose params go on from them, at a rate that moves nothing."""
    folder = make_project(tmp_path_factory.mktemp("initial") / "project")
    path = folder / "params.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    for section in ("autoencoder", "calm", "transformer"):
        values[section].update(steps=3, warmup_steps=0)
    values["calm"].update(head=request.param)
    for section in ("calm", "transformer"):
        values[section].update(checkpoints=3)
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text()[:20_000])
    path.write_text(yaml.safe_dump(values))
    with contextlib.chdir(folder):
        for stage in (check_params, digest_corpus, tokenise, match_compute, *TRAININGS):
            stage.main(load_params())
        (folder / "models").rename(folder / "given")
        for given, base in BASES.items():
            config = folder / "given" / given / "config.json"
            told = {**json.loads(config.read_text()), "base_model": base}
            if given == "transformer":
                told["backbone"]["norm_epsilon"] = 1e-5  # as a Llama that was imported
            config.write_text(json.dumps(told))
        for made in ("data", "results", ".checkpoints"):
            shutil.rmtree(folder / made)
        values.update(seed=5)
        for section in ("calm", "transformer"):
            values[section].update(initial=f"given/{section}", weight_decay=0.0)
            values[section].update(learning_rate=1e-38, embedding_learning_rate=1e-38, muon_learning_rate=1e-38)
        values["tokenizer"].update(path="given/calm/tokenizer.json")
        path.write_text(yaml.safe_dump(values))
        for stage in (check_params, digest_corpus, tokenise, match_compute, *TRAININGS):
            stage.main(load_params())
    return folder


@pytest.fixture()
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, in the current folder."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def of_latents(folder: Path) -> bool:
    return load_params(folder / "params.yaml").calm.needs_autoencoder


def change(path: Path) -> None:
    """Another model of the same shape."""
    weights = load_file(path)
    save_file({name: weight + 0.5 for name, weight in weights.items()}, path)


@pytest.mark.parametrize("model", ["calm", "transformer"])
def test_weights_are_those_of_the_given_model(trained: Path, model: str) -> None:
    before, after = (load_file(trained / part / model / "model.safetensors") for part in ("given", "models"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        # The rates are too small for any weight but one of zero, which is of no size either.
        assert torch.allclose(weight, after[name], rtol=0, atol=1e-30), name
    assert load_params(trained / "params.yaml").seed == 5  # a fresh one would be another


def test_the_epsilon_of_norms_comes_with_the_model(trained: Path) -> None:
    epsilon = {name: load_model(kind, trained / "models" / name).config.backbone.norm_epsilon for name, kind in MODELS}
    assert epsilon == {"calm": 1e-6, "transformer": 1e-5}


def base_of(folder: Path) -> str | None:
    base = json.loads((folder / "config.json").read_text()).get("base_model")
    assert base is None or isinstance(base, str)
    return base


def test_what_a_model_was_made_from_is_handed_on(trained: Path) -> None:
    models = trained / "models"
    assert (base_of(models / "calm"), base_of(models / "transformer")) == ("someone/base", "someone/llama")
    # A run's own autoencoder was made from none, nor is there one in the given CALM that was.
    assert base_of(models / "autoencoder") is None


def test_the_autoencoder_that_came_with_a_calm_tells_its_own(project: Path) -> None:
    given = project / "given/calm/autoencoder/config.json"
    if not of_latents(project):
        return
    given.write_text(json.dumps({**json.loads(given.read_text()), "base_model": "someone/coder"}))
    digest_corpus.main(load_params())
    for stage in TRAININGS[:3]:
        stage.main(load_params())
    assert base_of(project / "models/autoencoder") == base_of(project / "models/calm/autoencoder") == "someone/coder"


def test_an_autoencoder_of_latents_stays_and_is_measured(trained: Path) -> None:
    own = trained / "models/autoencoder"
    found = json.loads((trained / "results/autoencoder.json").read_text())
    measured = reconstruction(load_model(Autoencoder, own), TokenStream(trained / "data/tokens", "test"), 5)
    assert found == {**measured._asdict(), "parameters": found["parameters"]}
    curves = trained / "results/training/autoencoder"
    if of_latents(trained):
        given = sha256(trained / "given/calm/autoencoder/model.safetensors")
        assert sha256(own / "model.safetensors") == given
        assert sha256(trained / "models/calm/autoencoder/model.safetensors") == given
        assert [path.name for path in curves.iterdir()] == ["metrics.json"]
        assert read_curves(curves.parent)["autoencoder"] == {}
    else:  # nothing came with the model: trained as ever, under the seed of this run
        assert sha256(own / "model.safetensors") != sha256(trained / "given/autoencoder/model.safetensors")
        assert list(curves.rglob("*.tsv"))


def test_what_stands_for_the_models_changes_with_them_alone(project: Path) -> None:
    def told() -> dict[str, Any]:
        digest_corpus.main(load_params())
        return {path.stem: json.loads(path.read_text()) for path in sorted(Path("data/initial").iterdir())}

    before, texts = told(), Path("data/corpus.json").read_bytes()
    assert before["calm"]["model.safetensors"] == sha256(project / "given/calm/model.safetensors")
    coder = before["autoencoder"].get("model.safetensors")
    assert coder == (sha256(project / "given/calm/autoencoder/model.safetensors") if of_latents(project) else None)
    change(project / "given/transformer/model.safetensors")
    after = told()
    assert {name for name in before if before[name] != after[name]} == {"transformer"}
    change(project / "given/calm/model.safetensors")
    (project / "given/calm/README.md").touch()
    assert {name for name in before if after[name] != told()[name]} == {"calm"}
    # Interrupted work is that of one model alone.
    kept = folder_of("train_transformer", load_params())
    change(project / "given/transformer/model.safetensors")
    told()
    assert folder_of("train_transformer", load_params()) != kept
    assert Path("data/corpus.json").read_bytes() == texts
    values = yaml.safe_load((project / "params.yaml").read_text())
    for section in ("calm", "transformer"):
        values[section].update(initial="")
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert told() == {"autoencoder": {}, "calm": {}, "transformer": {}}


def test_models_are_found_from_a_copy_of_the_tree(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {path.name: path.read_bytes() for path in Path("data/initial").iterdir()}
    copy = project / ".dvc/tmp/exps/tmpx"
    copy.mkdir(parents=True)
    shutil.copy("params.yaml", copy)
    monkeypatch.chdir(copy)
    digest_corpus.main(load_params())
    assert {path.name: path.read_bytes() for path in Path("data/initial").iterdir()} == expected
    folder = initial_folder("calm", load_params())
    assert initial_base_model("given/calm", folder) == "someone/base"  # and no model of that name on the hub
    assert initial_base_model("", None) is None


def test_a_model_on_the_hub_is_as_one_in_a_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = project / "given/calm", {path.name: path.read_bytes() for path in Path("data/initial").iterdir()}
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["calm"].update(initial="someone/calm")
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        hub.models["someone/calm"] = {
            str(path.relative_to(given)): path.read_bytes() for path in given.rglob("*") if path.is_file()
        }
        digest_corpus.main(load_params())
        assert {path.name: path.read_bytes() for path in Path("data/initial").iterdir()} == expected
        # The tokenizer to set is a file, since tokenizer.path takes no name on the hub.
        tokenizer = (
            tmp_path / "home/hub/models--someone--calm/snapshots" / hub.commit("someone/calm") / "tokenizer.json"
        )
        values["tokenizer"].update(path="")
        for name, path in (("someone/calm", tokenizer), ("given/calm", "given/calm/tokenizer.json")):
            values["calm"].update(initial=name)
            (project / "params.yaml").write_text(yaml.safe_dump(values))
            with pytest.raises(CalmError, match=f"-S tokenizer.path={path}$"):
                digest_corpus.main(load_params())
    values["calm"].update(initial="someone/calm")
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    train_calm.main(load_params())  # from the cache
    assert base_of(project / "models/calm") == "someone/calm"
    values["calm"].update(initial="someone/else")
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CalmError, match=r"^calm\.initial: someone/else is no folder here; the Hugging Face hub"):
        digest_corpus.main(load_params())


@pytest.mark.parametrize("stage", [train_calm, train_transformer, train_autoencoder])
def test_a_model_that_changed_behind_the_digest_is_refused(project: Path, stage: Any) -> None:
    model = stage.__name__.removeprefix("stages.train_")
    if model == "autoencoder" and not of_latents(project):
        return
    change(project / {"autoencoder": "given/calm/autoencoder"}.get(model, f"given/{model}") / "model.safetensors")
    with pytest.raises(CalmError, match=r"given/.*model\.safetensors has changed since the run began"):
        stage.main(load_params())


@pytest.mark.parametrize("stage", [train_calm, train_transformer])
def test_params_that_changed_behind_the_digest_are_refused(project: Path, stage: Any) -> None:
    section = stage.__name__.removeprefix("stages.train_")
    values = yaml.safe_load((project / "params.yaml").read_text())
    layers = values[section]["layers"]
    values[section].update(layers=layers + 1)
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CalmError, match=rf"needs other params; .* -S {section}\.layers={layers}$"):
        stage.main(load_params())


def test_another_autoencoder_than_the_models_is_refused(project: Path) -> None:
    if not of_latents(project):
        return
    change(project / "given/calm/autoencoder/model.safetensors")
    digest_corpus.main(load_params())
    with pytest.raises(CalmError, match="models/autoencoder is not the autoencoder in .*given/calm; run `dvc repro"):
        train_calm.main(load_params())


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        (
            "missing",
            r"calm\.initial: missing is no folder; a model is a folder, or OWNER/NAME or OWNER/NAME@REVISION",
        ),
        (
            "models/calm",
            r"calm\.initial is models/calm, but the run writes models/calm anew; copy the model to another",
        ),
        ("given", r"calm\.initial: .*/given holds no model; name a folder with config\.json and model\.safetensors"),
        ("given/transformer", r"given/transformer holds a model of kind 'transformer'; name a calm's"),
    ],
)
def test_a_folder_that_will_not_do_is_one_line_before_any_work(project: Path, folder: str, told: str) -> None:
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["calm"].update(initial=folder)
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    kept = Path("data/corpus.json").stat().st_mtime_ns
    with pytest.raises(CalmError, match=told) as error:
        digest_corpus.main(load_params())
    assert "\n" not in str(error.value)
    assert Path("data/corpus.json").stat().st_mtime_ns == kept
