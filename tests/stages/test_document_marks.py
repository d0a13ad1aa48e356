"""A whole run whose documents begin with the BOS of a tokenizer: what each stage makes of it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.params import load_params
from calm_core.reference.exporting import export_checkpoint
from calm_core.storage.model_folder import read_config
from calm_core.tokens.document_marks import DocumentMarks
from stages import (
    check_params,
    digest_corpus,
    encode_corpus,
    match_compute,
    model_cards,
    report,
    tokenise,
    train_autoencoder,
    train_calm,
    train_transformer,
)
from tests.calm_core.tokens.published import PUBLISHED, write
from tests.reliability.support.stage_processes import make_project

BEGIN, END = 300, 301

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with models; its scores are not measured."""
    folder = make_project(tmp_path_factory.mktemp("marks") / "project")
    write(PUBLISHED["llama-3"](), folder)
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text()[:20_000])
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["corpus"].update(deduplicate=False)  # its words are few
    values["tokenizer"].update(path="tokenizer.json", vocabulary_size=304, document_marks="post_processor")
    for section in ("autoencoder", "calm", "transformer"):
        values[section].update(steps=3, warmup_steps=0)
    for section in ("calm", "transformer"):
        values[section].update(checkpoints=3)
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    trainings = (match_compute, train_autoencoder, encode_corpus, train_calm, train_transformer)
    with contextlib.chdir(folder):
        for stage in (check_params, digest_corpus, tokenise, *trainings):
            stage.main(load_params())
        scores = {kind: {"brierlm": 1.0} for kind in ("calm", "transformer")}
        Path("results/brierlm.json").write_text(json.dumps(scores))
        model_cards.main(load_params())
    return folder


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_models_know_how_their_documents_are_marked(trained: Path, kind: str) -> None:
    model, config = load_language_model(trained / "models" / kind), read_config(trained / "models" / kind)
    assert model.document_marks == DocumentMarks((BEGIN,), ())
    assert model.encode("a word") == PUBLISHED["llama-3"]().encode("a word").ids
    # Of a Transformer the BOS is opening enough.
    opening = config["opening"]
    assert opening is None if kind == "transformer" else len(opening) == 4 and not {BEGIN, END} & {*opening}
    assert "| document_marks | post_processor |" in (trained / "models" / kind / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(trained / "models" / kind).bos_token == "<|begin_of_text|>"


def test_a_transformer_leaves_with_the_token_that_begins_its_documents(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "models/transformer", tmp_path / "llama")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs("a word").input_ids == PUBLISHED["llama-3"]().encode("a word").ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (BEGIN, END)


def test_the_texts_of_the_report_begin_documents(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    stream = LanguageModel.stream

    def streamed(model: LanguageModel, prompts: list[list[int]], *others: Any) -> Any:
        seen.extend(prompts)
        return stream(model, prompts, *others)

    monkeypatch.chdir(trained)
    monkeypatch.setattr(LanguageModel, "stream", streamed)
    params = load_params()
    (row,) = report._samples(params)
    assert [(len(prompt), prompt[0]) for prompt in seen] == [(params.report.prompt_tokens + 1, BEGIN)] * 2
    assert not row["prompt"].startswith("<|begin_of_text|>")
