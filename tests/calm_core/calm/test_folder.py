"""A CALM and its autoencoder come out of their folder as they went in, or are refused where they do not belong."""

from pathlib import Path

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import AUTOENCODER, save_model


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    save_model(Calm(CalmConfig(11, 2, 4, BackboneConfig(8, 12, 1, 2, 1), EnergyHeadConfig(1, 4))), None, tmp_path)
    save_model(Autoencoder(AutoencoderConfig(11, 2, 8, 12, 4)), None, tmp_path / AUTOENCODER)
    return tmp_path


def test_both_models_of_a_folder(folder: Path) -> None:
    model, autoencoder = load_calm(folder)
    for loaded, path in ((model, folder), (autoencoder, folder / AUTOENCODER)):
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        save_model(loaded, None, folder / "again")
        assert (folder / "again/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    with torch.no_grad():
        assert model.inputs(torch.zeros(1, 1, 2, dtype=torch.int64), autoencoder).shape == (1, 1, 2)


@pytest.mark.parametrize("empty", [False, True])
def test_a_token_head_needs_no_autoencoder(tmp_path: Path, empty: bool) -> None:
    model = Calm(CalmConfig(11, 3, 8, BackboneConfig(8, 12, 1, 2, 1), TokenHeadConfig(6, 10, 2)))
    model.initialise(torch.Generator().manual_seed(0))
    save_model(model, None, tmp_path)
    if empty:
        (tmp_path / AUTOENCODER).mkdir()
    found, autoencoder = load_calm(tmp_path)
    assert autoencoder is None
    assert found.config == model.config
    assert all(torch.equal(weight, found.get_parameter(name)) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("size", "config"),
    [
        ("vocabulary_size is 11, but 12", AutoencoderConfig(12, 2, 8, 12, 4)),
        ("patch_size is 2, but 3", AutoencoderConfig(11, 3, 8, 12, 4)),
        ("latent_size is 4, but 5", AutoencoderConfig(11, 2, 8, 12, 5)),
    ],
)
def test_an_autoencoder_of_another_size_is_refused(folder: Path, size: str, config: AutoencoderConfig) -> None:
    save_model(Autoencoder(config), None, folder / AUTOENCODER)
    with pytest.raises(CalmError, match=f"is damaged: {size} of the autoencoder in it"):
        load_calm(folder)
