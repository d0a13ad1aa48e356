"""Which model of the Hugging Face hub another was made from, its ``base_model`` on cards, as the hub reads them.

A model that was imported from the hub, or whose training went on from one of the hub's, says so in its config.json, and
so do those that were made from it in turn.
"""

from pathlib import Path

from calm_core.errors import CalmError
from calm_core.storage.hub import NAME, repository_of
from calm_core.storage.json_io import read_json

BASE_MODEL = "base_model"
"""The key of config.json."""


def base_model_of(name: str | Path, folder: Path) -> str | None:
    """OWNER/NAME to give as the base of what is made from the model in ``folder``, which ``name`` names; None if none.

    It is ``name`` itself where that is one of the hub's, else what the folder says of its own base.

    Raises:
        CalmError: what the folder says is no name.
    """
    if (repository := repository_of(name)) is not None:
        return repository
    file = folder / "config.json"
    told = values.get(BASE_MODEL) if isinstance(values := read_json(file), dict) else None
    found = NAME.fullmatch(told) if isinstance(told, str) else None
    if told is not None and (found is None or found["revision"] is not None):
        raise CalmError(f"{file} is damaged: {BASE_MODEL} is {told!r}, not OWNER/NAME; put it right or delete the key")
    return told
