"""What stands around documents: an end-of-text token after each, or what the tokenizer's post-processor puts there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from calm_core.errors import CalmError
from calm_core.inference import evaluate_corpus as evaluation
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import read_config
from calm_core.tokens.batch_encoding import encode_documents
from calm_core.tokens.document_marks import DocumentMarks, post_processor_marks
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer
from tests.calm_core.reference.reference_data import reference_weights
from tests.calm_core.reference.test_newer_configs import resized, source_with
from tests.calm_core.tokens.published import PUBLISHED, byte_level, write

TEXTS = ["The quick brown fox", "jumps over", "", "the lazy dog, isn't it?"]
BEGIN, END = 300, 301
"""What `published` gives Llama 3's tokens."""


def imported(folder: Path, tokenizer: Tokenizer) -> LanguageModel:
    """A CALM of the reference's, with one row more than ``tokenizer`` has ids: that of [PAD]."""
    rows = max(tokenizer.get_vocab().values()) + 2
    source = source_with(folder, {"vocab_size": rows})
    save_file(resized(reference_weights("energy"), rows), source / "model.safetensors")
    write(tokenizer, source)
    import_checkpoint(source, folder / "own")
    return load_language_model(folder / "own")


@pytest.fixture()
def llama(tmp_path: Path) -> LanguageModel:
    return imported(tmp_path, PUBLISHED["llama-3"]())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("llama-3", [BEGIN], []), ("roberta", [0], [2]), ("bert", [2], [3]), ("t5", [], [1]), ("qwen", [], [300])],
)
def test_marks_are_those_of_the_post_processor(name: str, before: list[int], after: list[int], tmp_path: Path) -> None:
    """As the library itself encodes; a tokenizer that marks nothing ends documents by its end-of-text token."""
    loaded = load_tokenizer(write(PUBLISHED[name](), tmp_path))
    marks = post_processor_marks(loaded)
    assert (list(marks.before), list(marks.after)) == (before, after)
    joined: list[int] = []
    for batch in encode_documents(loaded, iter(TEXTS), marks):
        assert batch.lengths.sum() == len(batch.token_ids)
        joined += batch.token_ids.tolist()
    expected = [token_id for text in TEXTS for token_id in loaded.encode(text).ids]
    if name == "qwen":
        expected = [token_id for text in TEXTS for token_id in [*loaded.encode(text).ids, 300]]
    assert joined == expected


def test_a_prompt_begins_as_a_document_does(llama: LanguageModel) -> None:
    plain = PUBLISHED["llama-3"]()
    for text in TEXTS:
        assert llama.encode(text) == plain.encode(text).ids
    # Text that happens to hold the name of a special token is text.
    assert llama.encode("<|begin_of_text|>").count(BEGIN) == 1
    assert llama.decode(llama.encode(TEXTS[0])[1:]) == TEXTS[0]


def test_what_a_model_reads_and_where_it_stops(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first patch is filled with the token that begins documents: the other one is unknown to such a model."""
    seen: list[Any] = []
    script = [[5, 6, 7, 8], [9, BEGIN, 11, 12], [13, 14, 15, 16]]
    end_script = [[5, 6, END, 8]]

    def steps(written: list[list[int]]) -> Any:
        def scripted(model: Any, autoencoder: Any, prompts: Any, sampling: Any, draws: Any) -> Any:
            from calm_core.inference.decoding import Step

            seen.append(prompts.token_ids.tolist())
            once = torch.ones(1, dtype=torch.int64)
            for patch in written:
                yield Step(torch.tensor([patch]), once, once.bool(), True, once.bool())

        return scripted

    for written, expected in ((script, [5, 6, 7, 8, 9]), (end_script, [5, 6])):
        monkeypatch.setattr("calm_core.inference.language_model.calm_steps", steps(written))
        *_, (continuation,) = llama.stream([llama.encode("The")], 12, Sampling(), 0)
        assert continuation.token_ids == expected
        assert continuation.finish_reason == "end_of_text"
    prompt = llama.encode("The")
    assert seen[0] == [[BEGIN] * (4 - len(prompt)) + prompt]
    assert prompt[0] == BEGIN


def test_an_evaluation_joins_documents_as_the_reference_does(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    read: list[Any] = []
    score = evaluation._score
    monkeypatch.setattr(
        evaluation,
        "_score",
        lambda model, tokens, settings: (
            read.append(tokens.slice(0, len(tokens)).tolist()) or score(model, tokens, settings)
        ),
    )
    settings = evaluation.Settings(context_tokens=16)
    evaluation.evaluate_corpus(llama, str(tmp_path / "corpus.jsonl"), tmp_path / "out", settings)
    plain = PUBLISHED["llama-3"]()
    documents = [plain.encode(text).ids for text in TEXTS * 20 if text]  # the reader leaves empty ones out
    joined = [token_id for document in documents for token_id in document]
    assert read[0] == joined
    assert END not in read[0]


def test_tokens_with_another_end_of_documents_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    llama.tokenizer.save(str(tmp_path / "tokens/tokenizer.json"))
    for described, kind in (("{}", "end_of_text"), ('{"document_marks": "post_processor"}', None)):
        (tmp_path / "tokens/description.json").write_text(described)
        # Those of the model's own kind are read, and there are none.
        told = f"tokens has documents marked by {kind}, unlike the model's" if kind else "tokens holds no test tokens"
        with pytest.raises(CalmError, match=told):
            evaluation.evaluate_corpus(llama, str(tmp_path / "tokens"), tmp_path / "out", evaluation.Settings())


def test_a_tokenizer_without_marks_and_folders_of_earlier_versions(tmp_path: Path) -> None:
    model = imported(tmp_path, byte_level("<eos>"))
    assert read_config(tmp_path / "own")["document_marks"] == "post_processor"
    assert model.document_marks == DocumentMarks(after=(end_of_text_id(model.tokenizer),))
    assert model.encode("The") == byte_level("<eos>").encode("The").ids
    path = tmp_path / "own/config.json"
    config = json.loads(path.read_text())
    for value in ("bos", 3, ["post_processor"]):
        path.write_text(json.dumps(config | {"document_marks": value}))
        with pytest.raises(CalmError, match=r"own/config.json is damaged: document_marks is .*, not end_of_text or"):
            load_language_model(tmp_path / "own")
    del config["document_marks"]
    path.write_text(json.dumps(config))
    write(PUBLISHED["llama-3"](), tmp_path / "earlier")
    earlier = load_language_model(tmp_path / "own")
    assert earlier.document_marks == model.document_marks


def test_the_begin_stays_where_files_beside_name_another_end(tmp_path: Path) -> None:
    """As with the end of a turn in Llama 3's chat models, if the tokenizer knows no other."""
    path = write(PUBLISHED["llama-3"](), tmp_path)
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values).replace("<|end_of_text|>", "<|fin|>"), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|fin|>"}))
    loaded = load_tokenizer(path)
    assert isinstance(loaded.post_processor, processors.TemplateProcessing)
    assert post_processor_marks(loaded) == DocumentMarks((BEGIN,), (END,))
