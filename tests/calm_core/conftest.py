from typing import Any

import pytest
import yaml

from calm_core.params import Params, parse_params
from calm_core.presets import load_preset
from tests import ROOT


@pytest.fixture()
def values() -> dict[str, Any]:
    """The committed params.yaml, free to change."""
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


@pytest.fixture()
def smoke(monkeypatch: pytest.MonkeyPatch) -> Params:
    """The params of presets/smoke.yaml."""
    monkeypatch.chdir(ROOT)
    return load_preset("smoke")


@pytest.fixture()
def params(values: dict[str, Any]) -> Params:
    return parse_params(values)
