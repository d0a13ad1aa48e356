"""The stage's output changes with the compute of the run, and with nothing else."""

from pathlib import Path
from typing import Any

import pytest

from calm_core.params import Params, load_params
from calm_core.presets import load_preset
from calm_core.storage.json_io import read_json
from stages.match_compute import main
from tests import ROOT

OUTPUT = Path("data/transformer_steps.json")


@pytest.fixture()
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(ROOT)
    params = load_preset("smoke")
    monkeypatch.chdir(tmp_path)
    return params


def written(params: Params, **changes: dict[str, Any]) -> bytes:
    main(params.model_copy(update={k: getattr(params, k).model_copy(update=v) for k, v in changes.items()}))
    return OUTPUT.read_bytes()


def test_what_leaves_the_compute_alone_leaves_the_output_alone(smoke: Params) -> None:
    before = written(smoke)
    rates = {"learning_rate": 1.0, "muon_learning_rate": 1.0, "warmup_steps": 1, "gradient_clip": 9.0}
    assert written(smoke, calm=rates, autoencoder=rates, transformer=rates) == before
    assert written(smoke, calm={"alpha": 0.5, "target_samples": 8}, autoencoder={"kl_weight": 0.1}) == before


@pytest.mark.parametrize(
    ("head", "section", "more"),
    [
        ("tokens", "calm", True),
        ("tokens", "autoencoder", False),
        ("energy", "calm", True),
        ("energy", "autoencoder", True),
    ],
)
def test_more_steps_of_calm_or_the_autoencoder_it_needs_are_more_of_the_transformer(
    smoke: Params, head: str, section: str, more: bool
) -> None:
    smoke = smoke.model_copy(update={"calm": smoke.calm.model_copy(update={"head": head})})
    before = written(smoke)
    steps = read_json(OUTPUT)["steps"]
    after = written(smoke, **{section: {"steps": 2 * getattr(smoke, section).steps}})
    assert read_json(OUTPUT)["steps"] > steps if more else after == before


def test_a_number_is_passed_on_whatever_calm_does(smoke: Params) -> None:
    number = {"steps": 17}
    assert written(smoke, transformer=number) == written(smoke, transformer=number, calm={"steps": 100})
    assert read_json(OUTPUT) == {"steps": 17}


def test_params_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = load_params(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    main(params)
    assert read_json(OUTPUT)["steps"] > params.transformer.checkpoints
