"""Presets: overlays of params.yaml that say only what they change."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from calm_core.errors import CalmError, one_line
from calm_core.params import Params, parse_params, read_yaml
from calm_core.storage.atomic import write_text

PRESETS = Path("presets")


def preset_names() -> list[str]:
    """The presets there are, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str, base: Path = Path("params.yaml")) -> Params:
    """``base`` under the preset ``name``, validated; no file changes.

    Raises:
        CalmError: there is no such preset, or ``base`` or the preset over it is wrong.
    """
    # Validated before the overlay is applied, so that an error names the file that it is in.
    values = read_yaml(base)
    parse_params(values, str(base))
    _lay_over(values, _overlay(name))
    return parse_params(values, f"preset {name}")


def preset_models(name: str) -> set[str]:
    """The models whose training the preset ``name`` describes: the sections of which it names the steps; errors as
    ``load_preset``."""
    return {section for section, values in _overlay(name).items() if isinstance(values, dict) and "steps" in values}


def apply_preset(name: str, base: Path = Path("params.yaml")) -> None:
    """Write the preset ``name`` over ``base``; what it does not name, and all comments, stay. Errors as above."""
    load_preset(name, base)
    text = io.StringIO()
    try:
        # ruamel keeps comments, order and quotes of the file; PyYAML, which validated it above, would drop them.
        values = _yaml().load(base.read_text(encoding="utf-8"))
        _lay_over(values, _overlay(name))
        _yaml().dump(values, text)
    except (YAMLError, ValueError) as error:  # stricter than what reads params elsewhere: a key that stands twice
        raise CalmError(f"{base} cannot be rewritten: {one_line(error)}") from None
    write_text(base, text.getvalue())


def _overlay(name: str) -> dict[str, Any]:
    # A preset is one of the names in the folder, so that none leads out of it.
    if name not in preset_names():
        raise CalmError(f"preset {name!r} is unknown; there are: {', '.join(preset_names()) or 'none'}")
    overlay = read_yaml(PRESETS / f"{name}.yaml")
    if not isinstance(overlay, dict):
        raise CalmError(f"{PRESETS / name}.yaml holds no mapping of sections")
    return overlay


def _lay_over(values: Any, overlay: dict[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key].update(value)
        else:
            values[key] = value


def _yaml() -> YAML:
    yaml = YAML()
    # Lines that the user wrote are not folded.
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml
