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
from calm_core.storage.model_folder import REMEDY, load_model, read_config, save_model
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


def test_no_stage_is_promised_for_a_folder_that_none_made(tmp_path: Path) -> None:
    """Whatever is wrong with it: an imported model is imported again."""
    transformer = Transformer(TransformerConfig(11, BACKBONE))
    made = {path: path.read_bytes() for path in saved(transformer, tmp_path)}
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def cut(path: Path) -> None:
        path.write_bytes(made[path][:-9])

    def other_shape(path: Path) -> None:
        path.write_bytes(made[path].replace(b'"vocabulary_size": 11', b'"vocabulary_size": 12'))

    for path, damage in ((config, cut), (config, Path.unlink), (config, other_shape), (weights, cut),
                         (weights, Path.unlink)):  # fmt: skip
        damage(path)
        with pytest.raises(CalmError) as told:
            load_model(Transformer, tmp_path)
        assert str(told.value).startswith(str(tmp_path))
        assert str(told.value).count("dvc repro") == 1
        assert REMEDY in str(told.value)
        path.write_bytes(made[path])


def saved(model: Transformer, folder: Path) -> list[Path]:
    """The files of ``model``, written to ``folder``."""
    save_model(model, None, folder, 64)
    return [folder / "config.json", folder / "model.safetensors"]
