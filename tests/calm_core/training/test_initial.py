"""What a model to go on from has to have in common with params.yaml, and how the trainings take it."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.calm.training import train_calm
from calm_core.corpus.digest import file_digests
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.params import DocumentMarksKind, LanguageModelSection, Params, parse_params
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.model_folder import AUTOENCODER, load_model, save_model
from calm_core.tokens.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size_of
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.initial import (
    AUTOENCODER_SIZES,
    BACKBONE_SIZES,
    HEAD_SIZES,
    files_of,
    require_agreement,
    require_unchanged,
)
from calm_core.training.run import Run
from calm_core.transformer.model import Transformer, TransformerConfig
from calm_core.transformer.training import train_transformer
from tests.calm_core.tokens.published import PUBLISHED, write
from tests.calm_core.training.tiny_trainings import (
    VOCABULARY,
    calm_section,
    encoded,
    random_tokens,
    seeded,
    stream_of,
    tiny_autoencoder,
    transformer_section,
)

HEADS: dict[str, AnyHeadConfig] = {
    "tokens": TokenHeadConfig(6, 9, 2),
    "energy": EnergyHeadConfig(3, 5),
    "diffusion": DiffusionHeadConfig(3, sampling_steps=20),
    "flow": FlowHeadConfig(3, "euler", 7),
}
WIDTHS = BackboneConfig(8, 12, 1, 2, 1, 500.0)
CODER = AutoencoderConfig(0, 2, 10, 14, 6, 3, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    "calm": {"hidden_size": 8, "intermediate_size": 12, "layers": 1, "heads": 2, "key_value_heads": 1}
    | {"rope_theta": 500.0, "input": "tokens", "head_blocks": 3, "noise_size": 5}
    | {"diffusion_steps": 20, "flow_solver": "euler", "flow_steps": 7}
    | {"token_hidden_size": 6, "token_intermediate_size": 9, "token_layers": 2},
    "autoencoder": {"patch_size": 2, "hidden_size": 10, "intermediate_size": 14, "latent_size": 6}
    | {"encoder_layers": 3, "decoder_layers": 4},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one two three"] * 9, 262)


@pytest.fixture(params=[*HEADS, "transformer"])
def given(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> tuple[LanguageModelSection, Path]:
    """A model in a folder; one row of its embedding is the [PAD] that the reference adds."""
    folder, rows = tmp_path / "given", vocabulary_size_of(tokenizer) + 1
    if request.param == "transformer":
        save_model(Transformer(TransformerConfig(rows, WIDTHS)), tokenizer, folder)
        return "transformer", folder
    head = HEADS[request.param]
    latent_size = WIDTHS.hidden_size if request.param == "tokens" else CODER.latent_size
    save_model(Calm(CalmConfig(rows, 2, latent_size, WIDTHS, head)), tokenizer, folder)
    if request.param != "tokens":
        save_model(Autoencoder(dataclasses.replace(CODER, vocabulary_size=rows)), None, folder / AUTOENCODER)
    return "calm", folder


def agreeing(values: dict[str, Any], section: LanguageModelSection, folder: Path) -> dict[str, Any]:
    """``values`` of params.yaml that go with the model in ``folder``."""
    values["evaluation"]["beside"] = []
    values[section]["initial"] = str(folder)
    values["tokenizer"].update(path=str(folder / "tokenizer.json"), vocabulary_size=262)
    values["autoencoder"].update(SETTINGS["autoencoder"])
    of_backbone = {name: SETTINGS["calm"][name] for name in BACKBONE_SIZES}
    values[section].update(SETTINGS["calm"] if section == "calm" else of_backbone)
    if section == "calm":
        values["calm"]["head"] = read_json(folder / "config.json")["head"]["kind"]
    return values


def refused(values: dict[str, Any], section: LanguageModelSection, folder: Path, tokenizer: Path | None) -> str:
    with pytest.raises(CalmError) as error:
        require_agreement(section, parse_params(values), folder, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


def told_settings(told: str) -> dict[str, Any]:
    """What a shell would pass to `dvc exp run`."""
    words = shlex.split(told.partition("`dvc exp run` ")[2])
    assert words[::2] == ["-S"] * (len(words) // 2)
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words[1::2])}


def test_every_size_of_a_config_has_its_param_or_is_no_matter_of_weights() -> None:
    # The epsilon of its norms a model brings with it: its training is that of the model itself.
    assert {field.name for field in dataclasses.fields(BackboneConfig)} == {*BACKBONE_SIZES, "norm_epsilon"}
    assert {field.name for field in dataclasses.fields(AutoencoderConfig)} == {*AUTOENCODER_SIZES, "vocabulary_size"}
    own = {field.name for field in dataclasses.fields(CalmConfig)}
    assert own == {"vocabulary_size", "patch_size", "latent_size", "backbone", "head", "input"}
    assert HEADS.keys() == HEAD_SIZES.keys()
    for kind, config in HEADS.items():
        without_param = {"kind", "training_steps", "start_is_noise"}
        assert {field.name for field in dataclasses.fields(config)} - without_param == set(HEAD_SIZES[kind])


def test_params_that_agree_are_taken(values: dict[str, Any], given: tuple[LanguageModelSection, Path]) -> None:
    section, folder = given
    params = parse_params(agreeing(values, section, folder))
    require_agreement(section, params, folder, folder / "tokenizer.json")


def test_each_disagreement_is_told_with_the_value_to_set(
    values: dict[str, Any], given: tuple[LanguageModelSection, Path]
) -> None:
    section, folder = given
    right = agreeing(values, section, folder)
    head = right["calm"]["head"] if section == "calm" else ""
    wrong: dict[str, Any] = {f"{section}.{name}": right[section][name] * 2 for name in BACKBONE_SIZES}
    wrong |= {"tokenizer.vocabulary_size": 300}
    if section == "calm":
        keys = [key for key in HEAD_SIZES[head].values() if key != "flow_solver"]
        wrong |= {f"calm.{key}": right["calm"][key] + 1 for key in keys}
        wrong |= {"calm.flow_solver": "midpoint"} if head == "flow" else {}
        sizes = ("patch_size",) if head == "tokens" else AUTOENCODER_SIZES
        wrong |= {f"autoencoder.{name}": right["autoencoder"][name] * 2 for name in sizes}
        if head != "tokens":
            wrong |= {"calm.input": "latents"}
    # Heads divide the hidden size, so these go together.
    every = {key: dict(right[key]) for key in ("tokenizer", "autoencoder", "calm", "transformer")}
    for key, value in wrong.items():
        part, _, name = key.partition(".")
        every[part][name] = value
        if name in ("hidden_size", "heads", "key_value_heads") and part == section:
            continue
        alone = {**right, part: {**right[part], name: value}}
        assert told_settings(refused(alone, section, folder, folder / "tokenizer.json")) == {key: right[part][name]}
    told = refused({**right, **every}, section, folder, folder / "tokenizer.json")
    assert told.startswith(f"{section}.initial: {folder} needs other params; ")
    assert told_settings(told) == {key: right[key.split(".")[0]][key.split(".")[1]] for key in wrong}


def test_another_head_is_told(values: dict[str, Any], given: tuple[LanguageModelSection, Path]) -> None:
    section, folder = given
    if section == "transformer":
        return
    right = agreeing(values, section, folder)
    head = right["calm"]["head"]
    other = {**right, "calm": {**right["calm"], "head": "flow" if head == "energy" else "energy"}}
    assert told_settings(refused(other, section, folder, folder / "tokenizer.json")) == {"calm.head": head}


def test_the_tokenizer_has_to_be_the_models(
    values: dict[str, Any], given: tuple[LanguageModelSection, Path], tmp_path: Path
) -> None:
    section, folder = given
    right, needed = agreeing(values, section, folder), {"tokenizer.path": str(folder / "tokenizer.json")}
    right["tokenizer"]["path"] = ""
    assert told_settings(refused(right, section, folder, None)) == needed
    other = tmp_path / "other.json"
    train_tokenizer(["four five six"] * 9, 262).save(str(other))
    assert told_settings(refused(right, section, folder, other)) == needed
    assert told_settings(refused(right, section, folder, tmp_path / "gone.json")) == needed
    # Another text of the same tokenizer is the same.
    write_json(other, read_json(folder / "tokenizer.json"))
    require_agreement(section, parse_params(right), folder, other)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(right, section, folder, None)


@pytest.mark.parametrize(("name", "differ"), [("llama-3", True), ("bert", True), ("t5", False), ("qwen", False)])
def test_documents_have_to_be_marked_as_the_model_knows_them(
    name: str, differ: bool, values: dict[str, Any], tmp_path: Path
) -> None:
    """Where a tokenizer's post-processor puts its end of text behind a text, or nothing, both kinds are one."""
    kinds: tuple[DocumentMarksKind, DocumentMarksKind] = ("end_of_text", "post_processor")
    rows = vocabulary_size_of(tokenizer := load_tokenizer(write(PUBLISHED[name](), tmp_path)))
    model = Transformer(TransformerConfig(rows, WIDTHS))
    for kind, other in (kinds, kinds[::-1]):
        folder = tmp_path / kind
        save_model(model, tokenizer, folder, 64, None, kind)
        right = agreeing(values, "transformer", folder)
        right["tokenizer"].update(vocabulary_size=rows, document_marks=kind)
        require_agreement("transformer", parse_params(right), folder, folder / "tokenizer.json")
        right["tokenizer"].update(document_marks=other)
        if differ:
            told = refused(right, "transformer", folder, folder / "tokenizer.json")
            assert told_settings(told) == {"tokenizer.document_marks": kind}
        else:
            require_agreement("transformer", parse_params(right), folder, folder / "tokenizer.json")
    # An imported Llama's folder has the BOS as an opening, and does not tell.
    if name == "llama-3":
        save_model(model, tokenizer, folder, 64, [300])
        for kind in kinds:
            right["tokenizer"].update(document_marks=kind)
            require_agreement("transformer", parse_params(right), folder, folder / "tokenizer.json")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"document_marks": "bos"})
    assert "is damaged: document_marks is 'bos', not end_of_text or post_processor" in refused(
        right, "transformer", folder, folder / "tokenizer.json"
    )


def test_a_folder_that_is_no_such_model_is_one_line(
    values: dict[str, Any], given: tuple[LanguageModelSection, Path]
) -> None:
    section, folder = given
    right, file = agreeing(values, section, folder), folder / "config.json"
    other: LanguageModelSection = "calm" if section == "transformer" else "transformer"
    right[other]["initial"] = str(folder)
    assert f"holds a model of kind {section!r}; name a {other}'s" in refused(right, other, folder, None)
    right[other]["initial"] = ""
    config = read_json(file)
    write_json(file, {**config, "backbone": {**config["backbone"], "layers": "$(rm -r ~)"}})
    assert f"no sensible {section}.layers" in refused(right, section, folder, None)
    write_json(file, {key: value for key, value in config.items() if key != "backbone"})
    assert "config.json has no 'backbone'" in refused(right, section, folder, None)
    file.unlink()
    assert "holds no model; name a folder with config.json" in refused(right, section, folder, None)


def test_models_that_have_changed_are_refused(given: tuple[LanguageModelSection, Path], tmp_path: Path) -> None:
    _, folder = given
    files, digest = files_of(folder), tmp_path / "digest.json"
    assert {path.name for path in files.values()} == {"config.json", "model.safetensors", "tokenizer.json"}
    write_json(digest, dict(zip(files, file_digests(list(files.values()), tmp_path / "record"), strict=True)))
    require_unchanged(folder, digest)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CalmError, match=r"model\.safetensors has changed since the run began; run `dvc repro`"):
        require_unchanged(folder, digest)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CalmError, match="is not the model that"):
        require_unchanged(folder, digest)


Training = Callable[[Run, int], torch.nn.Module]
"""Trains a model to go on from, drawn under a seed."""


@pytest.fixture(params=["energy", "tokens", "transformer"])
def training(request: pytest.FixtureRequest, params: Params, tmp_path: Path) -> Training:
    tokens = stream_of(tmp_path, random_tokens(90))
    if request.param == "transformer":
        of_transformer = transformer_section(params, steps=4, warmup_steps=0)

        def transformer(run: Run, seed: int) -> torch.nn.Module:
            initial = Transformer(TransformerConfig(VOCABULARY + 1, BackboneConfig(16, 24, 1, 2, 1)))
            initial.initialise(seeded(seed))
            save_model(initial, None, tmp_path / "initial")
            changed = params.model_copy(update={"transformer": of_transformer})
            return train_transformer(changed, tokens, VOCABULARY, run, load_model(Transformer, tmp_path / "initial"))

        return transformer
    section = calm_section(params, head=request.param, steps=4, warmup_steps=0)
    autoencoder = tiny_autoencoder(2)
    latents = encoded(tmp_path, tokens, autoencoder)
    head = EnergyHeadConfig(1, 5) if request.param == "energy" else TokenHeadConfig(12, 20, 2)
    latent_size = 6 if request.param == "energy" else 16

    def calm(run: Run, seed: int) -> torch.nn.Module:
        initial = Calm(CalmConfig(VOCABULARY + 1, 2, latent_size, BackboneConfig(16, 24, 1, 2, 1), head))
        initial.initialise(seeded(seed))
        save_model(initial, None, tmp_path / "initial")
        changed = params.model_copy(update={"calm": section})
        return train_calm(changed, tokens, latents, autoencoder, run, load_model(Calm, tmp_path / "initial"))

    return calm


class InterruptedHereError(Exception):
    """An interruption."""


def test_a_training_that_resumes_has_the_weights_of_its_checkpoint(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training(Run(), 1)
    monkeypatch.setattr(CheckpointStore, "due", lambda store: True)

    def stop(step: int, model: Any) -> None:
        raise InterruptedHereError

    stores = [CheckpointStore(tmp_path / "store", "test") for _ in range(2)]
    with pytest.raises(InterruptedHereError):
        training(Run(checkpoints=stores[0], keep=stop, kept_after=frozenset({3})), 1)
    # Another model now, which it must not begin with.
    resumed = training(Run(checkpoints=stores[1]), 2)
    other = training(Run(), 2)
    for name, weight in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight), name
    assert any(not torch.equal(other.get_parameter(name), weight) for name, weight in whole.named_parameters())
