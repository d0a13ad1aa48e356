import socket
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from calm_core.report.model_card import TITLES, render_model_card

CORPUS = {
    "source": "botocore 1.40",
    "licence": "Apache-2.0",
    "splits": {
        "train": {"documents": 1234, "tokens": 5_678_901},
        "validation": {"documents": 43, "tokens": 65_432},
        "test": {"documents": 56, "tokens": 78_901},
    },
}
CONFIG = {"kind": "calm", "context_tokens": 256, "patch_size": 4, "head": {"kind": "diffusion", "blocks": 3}}
RESULTS = {
    "brierlm": 1.2345678,
    "brierlm_ci95": [1.1234567, 1.3456789],
    "positions": 1000,
    "bits_per_byte": 2.34567891,
    "by_context": [{"context_tokens": 64, "brierlm": 0.5}],
}


def card(kind: str) -> str:
    return render_model_card(kind, CONFIG, CORPUS, {"steps": 2000, "learning_rate": 0.0003}, RESULTS)


def header(text: str) -> dict[str, Any]:
    """What a reader of Markdown under YAML takes for the header: between the first two lines of three dashes."""
    lines = text.splitlines()
    assert lines[0] == "---"
    return yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))


def rows(text: str) -> dict[str, str]:
    """The tables' rows, name to value."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 2 for row in cells)
    return {name.strip(): value.strip() for name, value in cells}


@pytest.mark.parametrize("kind", TITLES)
def test_header_is_yaml_and_names_the_model(kind: str) -> None:
    found = header(card(kind))
    assert found["library_name"] == "calm_core"
    assert set(found["tags"]) == {"calm", "arxiv:2510.27688", kind}
    assert len(found["tags"]) == len(set(found["tags"]))
    assert f"\n# {TITLES[kind]}\n" in card(kind)
    assert card(kind).endswith("\n")


def test_data_results_and_shape_are_there() -> None:
    text = card("calm")
    for part in ("botocore 1.40", "Apache-2.0", "1,234 documents", "5,678,901 tokens", "test split: 78,901 tokens"):
        assert part in text
    table = rows(text)
    assert table["brierlm"] == "1.2346"
    assert table["brierlm_ci95"] == "[1.1235, 1.3457]"
    assert table["positions"] == "1000"
    assert table["bits_per_byte"] == "2.3457"
    assert "by_context" not in table
    assert (table["context_tokens"], table["patch_size"]) == ("256", "4")
    assert (table["head.kind"], table["head.blocks"]) == ("diffusion", "3")
    assert (table["steps"], table["learning_rate"]) == ("2000", "0.0003")


@pytest.mark.parametrize(
    ("results", "split", "tokens"),
    [
        ({"token_accuracy": 0.999}, "test", "78,901"),
        ({**RESULTS, "split": "test"}, "test", "78,901"),
        ({**RESULTS, "split": "validation"}, "validation", "65,432"),
    ],
)
def test_the_split_is_the_one_that_was_scored(results: dict[str, Any], split: str, tokens: str) -> None:
    text = render_model_card("calm", CONFIG, CORPUS, {}, results)
    assert f"; {split} split: {tokens} tokens." in text
    assert f"\n## Results, {split} split\n" in text
    assert [result.dataset_split for result in ModelCard(text).data.eval_results] == [split]


def test_a_card_says_which_head_a_calm_has() -> None:
    of_latents, of_tokens = (
        render_model_card("calm", {**CONFIG, "head": {"kind": kind, "layers": 1}}, CORPUS, {}, RESULTS)
        for kind in ("energy", "tokens")
    )
    assert "predicts one latent vector for every K tokens; its autoencoder, in `autoencoder/`" in of_latents
    assert "token head" not in of_latents
    assert "the token head, then writes the tokens of the patch one by one" in of_tokens
    assert "neither continuous latents nor an autoencoder" in of_tokens
    assert "`autoencoder/`" not in of_tokens


def test_a_card_says_what_the_training_went_on_from() -> None:
    params = {"initial": "/home/somebody/imported|", "steps": 2000}
    for kind in ("calm", "transformer"):
        text = render_model_card(kind, CONFIG, CORPUS, params, RESULTS)
        assert "Not from the beginning: it went on from `imported&#124;`. Data, steps and compute" in text
        assert rows(text)["steps"] == "2000"
        fresh = render_model_card(kind, CONFIG, CORPUS, {**params, "initial": ""}, RESULTS)
        assert "went on" not in fresh
        assert "initial" not in rows(text) | rows(fresh)
        assert "somebody" not in text
    text = render_model_card("autoencoder", CONFIG, CORPUS, {"initial": "imported"}, {"token_accuracy": 0.5})
    assert "None here: it came with the CALM `imported`, and is as it was there." in text
    assert "steps" not in rows(text)
    text = render_model_card("calm", CONFIG, CORPUS, {"initial": "someone/model@v1"}, RESULTS)
    assert "it went on from `someone/model@v1`." in text


@pytest.mark.parametrize(
    ("initial", "whence"),
    [
        ("someone/base", "`someone/base`"),
        ("someone/base@v1", "`someone/base@v1`"),
        ("/home/somebody/imported", "`imported`, of `someone/base`"),
        ("imported/model", "`imported/model`, of `someone/base`"),
    ],
)
def test_the_hub_finds_what_a_model_was_trained_on_from(initial: str, whence: str) -> None:
    config, params = {**CONFIG, "base_model": "someone/base"}, {"initial": initial, "steps": 2000}
    for kind in ("calm", "transformer"):
        text = render_model_card(kind, config, CORPUS, params, RESULTS)
        data = ModelCard(text).data
        assert (data.base_model, data.get("base_model_relation")) == ("someone/base", "finetune")
        assert data.license is None  # that of the other model's makers, which nobody told here
        assert f"it went on from {whence}. Data" in text
        assert "this card names no licence" in text
        assert not {"base_model", "initial"} & rows(text).keys()
    text = render_model_card("autoencoder", config, CORPUS, {"initial": initial}, {"token_accuracy": 0.5})
    data = ModelCard(text).data
    assert (data.base_model, data.get("base_model_relation"), data.license) == ("someone/base", None, None)
    assert f"it came with the CALM {whence}, and is as it was there." in text


@pytest.mark.parametrize("initial", ["", "imported"])
def test_a_model_of_no_base_names_none(initial: str) -> None:
    found = header(render_model_card("calm", CONFIG, CORPUS, {"initial": initial}, RESULTS))
    assert not {"base_model", "base_model_relation"} & found.keys()
    assert ("license" in found) is (not initial)


@pytest.mark.parametrize("kind", TITLES)
def test_code_that_loads_the_model_names_what_exists(kind: str) -> None:
    code = card(kind).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    exec("\n".join(line for line in code.splitlines() if line.startswith("from ")), {})
    assert f'"models/{kind}"' in code


def test_the_hub_finds_license_data_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    results = {
        "autoencoder": {"token_accuracy": 0.999, "token_accuracy_noisy": 0.99, "parameters": 7},
        "calm": RESULTS,
        "transformer": {**RESULTS, "cross_entropy_nats": 2.5},
    }
    found = {}
    for kind, figures in results.items():
        text = render_model_card(kind, CONFIG, CORPUS, {}, figures)
        read = ModelCard(text)
        assert str(read) == text
        assert ModelCardData(**yaml.safe_load(read.data.to_yaml())) == read.data
        assert read.data.license == "mit"
        assert read.data.model_name == TITLES[kind]
        for result in read.data.eval_results:
            data = (result.dataset_name, result.dataset_type, result.dataset_split)
            assert data == ("botocore 1.40", "botocore", "test")
        found[kind] = [(result.metric_type, result.metric_value) for result in read.data.eval_results]
    assert found == {
        "autoencoder": [("accuracy", 0.999), ("accuracy", 0.99)],
        "calm": [("brierlm", 1.2345678)],
        "transformer": [("brierlm", 1.2345678), ("cross_entropy", 2.5)],
    }


@pytest.mark.parametrize(
    ("source", "identifier"),
    [
        ("dataset: roneneldan/TinyStories train", "roneneldan/TinyStories"),
        ("files: texts/*.jsonl, more.txt", "files"),
        ("botocore 1.43 API documentation", "botocore"),
        ("null", "null"),
        ("1.0", "1.0"),
    ],
)
def test_the_hub_finds_the_data_by_its_identifier(source: str, identifier: str) -> None:
    text = render_model_card("calm", CONFIG, {**CORPUS, "source": source}, {}, RESULTS)
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_type, result.dataset_name) == (identifier, source)
