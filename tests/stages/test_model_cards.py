"""The stage that describes the models, on models that are no more than their descriptions."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from calm_core.presets import load_preset
from calm_core.storage.json_io import write_json
from calm_core.tokens.tokenizer import train_tokenizer
from stages.model_cards import main
from tests import ROOT

SPLIT = {"documents": 12, "tokens": 345}


def test_a_card_and_a_tokenizer_for_others_in_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load_preset("smoke")
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["the name of the bucket"], 270)
    openings = {"autoencoder": None, "calm": [2, 3, 4, 1], "transformer": [1]}
    for kind, opening in openings.items():
        folder = Path("models") / kind
        context = None if kind == "autoencoder" else 24
        about = {"kind": kind, "context_tokens": context, "opening": opening, "head": {"kind": "tokens"}}
        write_json(folder / "config.json", about)
        tokenizer.save(str(folder / "tokenizer.json"))
    write_json(Path("data/transformer_steps.json"), {"steps": 7})
    splits = {"train": SPLIT, "validation": SPLIT, "test": SPLIT}
    write_json(Path("data/tokens/description.json"), {"source": "a folder", "licence": "MIT", "splits": splits})
    write_json(Path("results/autoencoder.json"), {"token_accuracy": 0.5})
    write_json(Path("results/brierlm.json"), {kind: {"brierlm": 1.5} for kind in ("calm", "transformer")})
    main(params)
    for kind, opening in openings.items():
        assert (Path("models") / kind / "README.md").is_file()
        found = AutoTokenizer.from_pretrained(Path("models") / kind)
        assert found("the <eos> of").input_ids == tokenizer.encode("the <eos> of").ids
        assert (found.eos_token, found.bos_token) == ("<eos>", "<eos>" if opening == [1] else None)
        assert kind == "autoencoder" or found.model_max_length == 24
    assert "| steps | 7 |" in Path("models/transformer/README.md").read_text()
    given = params.model_copy(update={"calm": params.calm.model_copy(update={"head": "energy", "initial": "imported"})})
    for told, calm in (("None here: it came with the CALM `imported`", given.calm), ("| steps | ", params.calm)):
        main(params.model_copy(update={"calm": calm}))
        assert told in Path("models/autoencoder/README.md").read_text()
