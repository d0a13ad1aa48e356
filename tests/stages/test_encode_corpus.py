"""Stage encode_corpus where the training computes latents itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_core.params import parse_params
from stages import encode_corpus
from tests import ROOT


def test_online_latents_are_a_description_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["calm"]["latents"] = "online"
    # Neither tokens nor an autoencoder are here: nothing of them is read.
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "data/latents/posteriors-00000.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier run")
    encode_corpus.main(parse_params(values))
    assert [path.name for path in (tmp_path / "data/latents").iterdir()] == ["description.json"]
    assert json.loads((tmp_path / "data/latents/description.json").read_text()) == {"latents": "online", "sha256": {}}
