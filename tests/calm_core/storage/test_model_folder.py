"""Models survive a trip through their folder, and damage shows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import load_model, read_config, save_model
from calm_core.tokens.tokenizer import load_tokenizer, train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words, a few more"], 260)


def test_the_epsilon_of_norms_is_told_where_it_is_another(tmp_path: Path) -> None:
    for epsilon, told in ((1e-6, False), (1e-5, True)):
        model = Transformer(TransformerConfig(11, replace(BACKBONE, norm_epsilon=epsilon)))
        save_model(model, None, tmp_path, 64)
        assert ("norm_epsilon" in read_config(tmp_path)["backbone"]) is told
        loaded = load_model(Transformer, tmp_path)
        assert loaded.config == model.config
        assert loaded.backbone.norm.eps == loaded.backbone.layers[0].mlp_norm.eps == epsilon


def test_models_survive_their_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    calm = Calm(CalmConfig(11, 2, 12, BACKBONE, EnergyHeadConfig(2, 8)))
    calm.initialise(torch.Generator().manual_seed(0))
    save_model(calm, tokenizer, tmp_path, 64, (3, 1))
    assert read_config(tmp_path)["context_tokens"] == 64
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()
    loaded = load_model(Calm, tmp_path)
    assert loaded.config == calm.config
    for name, weight in calm.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    with pytest.raises(CalmError, match="no model of kind 'transformer'"):
        load_model(Transformer, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CalmError, match="damaged"):
        load_model(Calm, tmp_path)
