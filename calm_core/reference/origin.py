"""reference.json beside an imported model: what its export needs to give back what came.

That is the config.json, most of whose keys mean nothing here, and the type of each tensor that was not float32, by the
name that it had.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.reference.names import DTYPES
from calm_core.reference.untrusted_weights import Stored, read_mapping
from calm_core.storage.model_folder import ORIGIN

ADVICE = "delete it to export float32"


def origin_of(config: dict[str, Any], weights: Stored) -> dict[str, Any]:
    """What reference.json says of a checkpoint of ``config`` and ``weights``."""
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    return {"config": config, "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}}


def read_origin(folder: Path) -> dict[str, Any]:
    """What reference.json in ``folder`` says, nothing of a model that was not imported; CalmError if it is damaged."""
    path = folder / ORIGIN
    origin = read_mapping(path) if path.is_file() else {}
    if not all(isinstance(origin.setdefault(key, {}), dict) for key in ("config", "dtypes")):
        raise CalmError(f"{path} is damaged; {ADVICE}")
    return origin


def original_types(weights: Mapping[str, Tensor], origin: dict[str, Any], folder: Path) -> dict[str, torch.dtype]:
    """The type that each of ``weights`` came in, by ``origin``, which is ``folder``'s; else the one that it has.

    It became float32 without loss, bar float64.

    Raises:
        CalmError: ``origin`` names a tensor that there is not, or no type.
    """
    types = {name: weight.dtype for name, weight in weights.items()}
    for name, dtype in origin["dtypes"].items():
        if name not in weights or not isinstance(dtype, str) or dtype not in DTYPES:
            raise CalmError(f"{folder / ORIGIN} is damaged: {name!r} is {dtype!r}; {ADVICE}")
        types[name] = DTYPES[dtype]
    return types
