"""Presets: overlays of params.yaml that say only what they change.

A run is what params.yaml says, over which ``apply_preset`` writes one. Those of evaluation.beside describe further
CALMs of the same run: they change section calm alone, and lie over params.yaml as it is.
"""

from pathlib import Path
from typing import Any

from calm_core.errors import CalmError
from calm_core.params import CalmParams, Params, parse_params
from calm_core.storage.atomic import write_text
from calm_core.storage.yaml_io import read_yaml, read_yaml_for_update, yaml_text

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


def sections_beside(params: Params) -> dict[str, CalmParams]:
    """Section calm under each preset of evaluation.beside, by its name: of CALMs that share all else with ``params``.

    Raises:
        CalmError: there is no such preset, it changes another section or wants latents that ``params`` do not have
            encoded, or it is wrong over ``params``.
    """
    return {name: _section_beside(params, name) for name in params.evaluation.beside}


def preset_models(name: str) -> set[str]:
    """The models whose training the preset ``name`` describes: the sections of which it names the hidden size; errors
    as ``load_preset``."""
    # Of a section that it does not train a preset may still say the batch or the steps, so that the whole makes sense.
    sections = _overlay(name).items()
    return {section for section, values in sections if isinstance(values, dict) and "hidden_size" in values}


def apply_preset(name: str, base: Path = Path("params.yaml")) -> None:
    """Write the preset ``name`` over ``base``; what it does not name, and all comments, stay. Errors as above."""
    load_preset(name, base)
    values = read_yaml_for_update(base)
    _lay_over(values, _overlay(name))
    write_text(base.resolve(), yaml_text(values))  # through a link, as an editor does


def _section_beside(params: Params, name: str) -> CalmParams:
    overlay = _overlay(name)
    if others := [str(section) for section in overlay if section != "calm"]:
        raise CalmError(
            f"preset {name} changes {', '.join(others)}; in evaluation.beside use presets that change calm alone"
        )
    values = params.model_dump()
    _lay_over(values, overlay)
    section = parse_params(values, f"preset {name}").calm
    if (params.calm.latents, section.latents) == ("online", "encoded"):
        raise CalmError(
            f"preset {name} has calm.latents: encoded, but params.yaml online, which encodes none; set both to one"
        )
    return section


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
