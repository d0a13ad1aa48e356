"""A model's folder with a tokenizer.json from elsewhere: evaluated on whole texts, and what they lose is told."""

import json
from pathlib import Path

import pytest
import torch

from calm_core.inference.evaluate_corpus import Settings, evaluate_corpus
from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import save_model
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.tokens.published import PUBLISHED, TEXT, byte_level, write

TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A small random Transformer of 300 tokens, and a corpus of 12 documents beside it."""
    model = Transformer(TransformerConfig(300, BackboneConfig(8, 12, 1, 2, 1)))
    model.initialise(torch.Generator().manual_seed(0))
    save_model(model, None, tmp_path / "model", 16)
    lines = "".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(12))
    (tmp_path / "corpus.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "model"


def evaluated(model: LanguageModel, folder: Path) -> dict[str, object]:
    return evaluate_corpus(model, str(folder.parent / "corpus.jsonl"), folder.parent / "out", Settings(every=8))


def test_an_evaluation_sees_every_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = byte_level("<pad>", "<eos>")
    write(plain, folder)
    expected = evaluated(load_language_model(folder), folder)
    tokens = sum(len(plain.encode(f"{TEXT} {number}").ids) + 1 for number in range(12))
    assert expected["positions"] == 2 * ((tokens - 4) // 16)  # two of a block of 16 tokens
    write(plain, folder, truncation=TRUNCATION, model=json.loads(plain.to_str())["model"] | {"dropout": 0.9})
    assert evaluated(load_language_model(folder), folder) == expected
    assert "come back" not in capsys.readouterr().err


def test_an_evaluation_tells_what_its_texts_lose(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(PUBLISHED["uncased"](), folder)
    evaluated(load_language_model(folder), folder)
    told = [line for line in capsys.readouterr().err.splitlines() if "come back" in line]
    assert len(told) == 1
    assert told[0].startswith("tokenise: of the first 12 documents 12 do not come back from their tokens: 'The quick")
