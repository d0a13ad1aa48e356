"""Presets: overlays of params.yaml that say only what they change."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from calm_core.artefacts import write_text
from calm_core.errors import CalmError
from calm_core.params import Params, load_params, parse_params

PRESETS = Path("presets")


def preset_names() -> list[str]:
    """The presets there are, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str, base: Path = Path("params.yaml")) -> Params:
    """``base`` under the preset ``name``, validated; no file changes."""
    load_params(base)
    return parse_params(_overlaid(name, base), f"preset {name}")


def apply_preset(name: str, base: Path = Path("params.yaml")) -> None:
    """Write the preset ``name`` over ``base``; what it does not name, and all comments, stay."""
    load_preset(name, base)
    values = _overlaid(name, base)
    text = io.StringIO()
    _yaml().dump(values, text)
    write_text(base, text.getvalue())


def _overlaid(name: str, base: Path) -> Any:
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        raise CalmError(f"preset {name!r} is unknown; there are: {', '.join(preset_names()) or 'none'}")
    values = _yaml().load(base.read_text(encoding="utf-8"))
    for key, value in _yaml().load(path.read_text(encoding="utf-8")).items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key].update(value)
        else:
            values[key] = value
    return values


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml
