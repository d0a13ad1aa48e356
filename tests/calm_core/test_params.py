from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calm_core.errors import CalmError
from calm_core.params import load_params, parse_params, with_transformer_steps
from calm_core.presets import (
    apply_preset,
    load_preset,
    preset_names,
    sections_beside,
)
from tests import ROOT


def test_committed_params_are_valid(values: dict[str, Any]) -> None:
    parse_params(values)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("calm", "widht", 3, ["calm.widht is unknown", "hidden_size"]),
        ("calm", "steps", "many", ["calm.steps", "'many'", "integer"]),
        ("calm", "steps", 0, ["calm.steps", "0", "greater than or equal to 1"]),
        ("calm", "head", "gan", ["calm.head", "'gan'", "'energy'"]),
        ("calm", "alpha", 2.0, ["calm.alpha", "less than 2"]),
        ("calm", "samples", 1, ["calm.samples", "greater than or equal to 2"]),
        ("calm", "heads", 3, ["calm", "heads 3 does not divide hidden_size 64"]),
        ("transformer", "key_value_heads", 3, ["key_value_heads 3 does not divide heads 4"]),
        ("autoencoder", "patch_size", 5, ["patch_size 5 does not divide calm.context_tokens 256"]),
        ("autoencoder", "latent_dropout", 1.0, ["autoencoder.latent_dropout", "less than 1"]),
        ("report", "temperature", 0.0, ["report.temperature", "greater than 0"]),
        ("report", "temperature", 1.5, ["report.temperature", "less than or equal to 1"]),
        ("evaluation", "temperatures", [1.0, 0.0], ["evaluation.temperatures.1", "greater than 0"]),
        ("evaluation", "temperatures", [], ["evaluation.temperatures", "at least 1"]),
        ("evaluation", "temperatures", [0.5, 1, 0.5], ["temperatures are [0.5, 1.0, 0.5]; each belongs there once"]),
        ("evaluation", "diversity_prompts", 15, ["evaluation.diversity_prompts", "greater than or equal to 16"]),
        ("evaluation", "samples", 1, ["evaluation.samples", "greater than or equal to 2"]),
        ("corpus", "source", "files", ["paths is empty"]),
        ("calm", "warmup_steps", 10**6, ["warmup_steps 1000000 exceeds steps"]),
        ("transformer", "steps", "many", ["transformer.steps is 'many'", "'match'", "integer"]),
        ("transformer", "steps", 0, ["transformer.steps", "0", "greater than or equal to 1"]),
        ("transformer", "steps", 49, ["transformer: warmup_steps 50 exceeds steps 49"]),
        ("calm", "steps", "match", ["calm.steps is 'match'", "integer"]),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], section: str, key: str, value: object, told: list[str]) -> None:
    values[section][key] = value
    with pytest.raises(CalmError) as raised:
        parse_params(values)
    message = str(raised.value)
    assert "\n" not in message
    for part in told:
        assert part in message


def test_steps_of_the_transformer_are_a_number_or_get_one(values: dict[str, Any]) -> None:
    params = parse_params(values)
    assert params.transformer.steps == "match"
    step_tokens = values["transformer"]["batch_sequences"] * values["transformer"]["context_tokens"]
    assert with_transformer_steps(params, 900).transformer.training_tokens == 900 * step_tokens
    values["transformer"]["steps"] = 321
    assert with_transformer_steps(parse_params(values), 900) == parse_params(values)
    with pytest.raises(CalmError, match="match stands for: transformer: warmup_steps 50 exceeds steps 49"):
        with_transformer_steps(params, 49)


def test_a_token_head_is_fed_tokens(values: dict[str, Any]) -> None:
    values["calm"] |= {"head": "tokens", "input": "latents"}
    with pytest.raises(
        CalmError, match="calm: input latents needs a head that predicts latents; .* write input: tokens"
    ):
        parse_params(values)
    values["calm"]["head"] = "energy"
    assert parse_params(values).calm.input == "latents"


def test_missing_and_unknown_sections(values: dict[str, Any]) -> None:
    del values["calm"]
    values["clam"] = {}
    with pytest.raises(CalmError) as raised:
        parse_params(values)
    assert "calm is missing" in str(raised.value)
    assert "clam is unknown; allowed here: seed, runtime, corpus" in str(raised.value)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
))  # fmt: skip
def test_any_yaml_gets_one_line(values: object) -> None:
    with pytest.raises(CalmError) as raised:
        parse_params(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["seed: [", "just text", "", "- 1", "seed: !!python/object:os.system x"])
def test_files_that_are_no_params(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(CalmError) as raised:
        load_params(path)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="is missing"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "presets").glob("*.yaml")])
def test_presets_are_valid_overlays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_preset(name)


def test_the_presets_beside_a_run_fit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert list(sections_beside(load_params())) == ["paper-objective"]
    for name in preset_names():
        params = load_preset(name)
        assert list(sections_beside(params)) == params.evaluation.beside


def test_a_calm_that_goes_on_has_none_beside_it(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values["calm"].update(initial="folder")
    with pytest.raises(
        CalmError, match=r"calm.initial is 'folder' but evaluation.beside \['paper-objective'\], .* to \[\]"
    ):
        parse_params(values)
    values["evaluation"].update(beside=[])
    assert not parse_params(values).calm.has_given_autoencoder  # a token head has none
    values["calm"].update(head="energy")
    assert parse_params(values).calm.has_given_autoencoder
    values["calm"].update(initial="")
    assert not parse_params(values).calm.has_given_autoencoder


def test_the_papers_objective_is_said_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What params.yaml says of another head, of its shape or its optimiser, is not the energy's."""
    monkeypatch.chdir(ROOT)
    params = load_params()
    first = sections_beside(params)["paper-objective"]
    other = {"head": "flow", "hidden_size": 64, "intermediate_size": 99, "layers": 2, "heads": 2, "key_value_heads": 1}
    other |= {"head_blocks": 1, "noise_size": 3, "samples": 9, "target_samples": 2, "alpha": 0.5}
    other |= {"decoder_score": False, "batch_sequences": 2, "steps": 999, "warmup_steps": 0, "schedule": "constant"}
    other |= {"optimiser": "adamw", "learning_rate": 1.0, "embedding_learning_rate": 1.0, "muon_learning_rate": 1.0}
    changed = params.model_copy(update={"calm": params.calm.model_copy(update=other)})
    assert sections_beside(changed)["paper-objective"] == first
    assert first.head == "energy"
    # And the rest is as it is there.
    kept = params.calm.model_copy(update={"context_tokens": 64, "gradient_clip": 2.0})
    found = sections_beside(params.model_copy(update={"calm": kept}))["paper-objective"]
    assert found == first.model_copy(update={"context_tokens": 64, "gradient_clip": 2.0})


def test_applying_a_preset_keeps_comments_and_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base = tmp_path / "params.yaml"
    base.write_text(Path("params.yaml").read_text())
    apply_preset("smoke", base)
    changed, original = yaml.safe_load(base.read_text()), yaml.safe_load(Path("params.yaml").read_text())
    overlay = yaml.safe_load(Path("presets/smoke.yaml").read_text())
    assert changed["calm"]["steps"] == overlay["calm"]["steps"] != original["calm"]["steps"]
    assert changed["calm"]["alpha"] == original["calm"]["alpha"]
    assert "# K, tokens a latent vector" in base.read_text()


def test_unknown_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(CalmError, match="'huge' is unknown; there are: .*smoke"):
        load_preset("huge")
    assert "smoke" in preset_names()


def test_a_trained_tokenizer_has_no_marks_of_its_own(values: dict[str, Any]) -> None:
    values["tokenizer"].update(document_marks="post_processor")
    with pytest.raises(CalmError, match="document_marks is post_processor but path is empty, and a trained tokenizer"):
        parse_params(values)
    values["tokenizer"].update(path="tokenizer.json")
    assert parse_params(values).tokenizer.document_marks == "post_processor"
