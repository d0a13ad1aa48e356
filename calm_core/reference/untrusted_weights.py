"""A checkpoint from elsewhere, read without trust: config.json, and tensors by name.

Weights come from safetensors, whole or in shards, or from a .bin read with ``weights_only``: nothing in it is run, and
none of it takes more memory than the file has.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_core.errors import CalmError, one_line
from calm_core.storage.json_io import read_json
from calm_core.storage.tensors import load_tensors

Weights = dict[str, Tensor]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all tensors of a checkpoint in ``folder``; raises CalmError where they cannot be read."""
    if not folder.is_dir():
        raise CalmError(f"{folder} is no folder; a checkpoint is a folder with config.json and {_WEIGHTS[0]}")
    config = read_mapping(folder / "config.json")
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        # Shards whose index was not fetched, say, or a file of another tool's.
        others = sorted(
            found.name for found in folder.iterdir() if found.suffix in (".safetensors", ".bin", ".pt", ".pth")
        )
        there = f"; it has {', '.join(others[:5])}" if others else ""
        raise CalmError(f"{folder} holds no weights; one of {', '.join(_WEIGHTS)} is needed{there}")
    if path.suffix != ".json":
        return config, _read_weights(path)
    shards = read_mapping(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CalmError(f"{path} names no shards: it has no weight_map")
    weights: Weights = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        # An index comes from elsewhere, too: a name with a folder in it could read any file.
        if Path(name).name != name or name in ("", ".."):
            raise CalmError(f"{path} names the shard {name!r}, which lies outside its folder")
        for tensor, weight in _read_weights(folder / name).items():
            # A shard of another model, say, that has the same names.
            if shards.get(tensor, name) != name:
                raise CalmError(f"{folder / name} holds {tensor}, which {path.name} places in {shards[tensor]}")
            weights[tensor] = weight
    if missing := sorted(set(shards) - set(weights)):
        raise CalmError(f"{path} lists tensors that its shards lack: {', '.join(missing)}")
    return config, weights


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises CalmError where there is none."""
    if not path.is_file():
        raise CalmError(f"{path} is missing; a checkpoint is a folder with config.json and {_WEIGHTS[0]}")
    try:
        values = read_json(path)
    except CalmError:
        raise CalmError(f"{path} is no JSON") from None
    if not isinstance(values, dict):
        raise CalmError(f"{path} holds no JSON object")
    return values


def _read_weights(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return load_tensors(path, "fetch it again")
    try:
        _require_stored(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except CalmError:
        raise
    except Exception as error:  # the unpickler fails in as many ways as there are bytes, for want of memory too
        raise CalmError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise CalmError(f"{path} holds no tensors by name; the weights of a model are needed, not a training state")
    for name, weight in weights.items():
        if not isinstance(name, str) or not _fills_its_shape(weight):
            raise CalmError(f"{path}: {name!r} is no plain tensor with a number for each place")
    return weights


def _require_stored(path: Path) -> None:
    """Raise CalmError if the archive ``path`` is compressed: torch writes none, and a small one can fill all memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes = [(entry.file_size, entry.compress_size) for entry in archive.infolist()]
        # Also the sum: entries of an archive may overlap, and then claim more bytes than the file has.
        if any(size != stored for size, stored in sizes) or sum(size for size, _ in sizes) > path.stat().st_size:
            raise CalmError(f"{path} cannot be read: its archive is compressed, which torch.save does not do")


def _fills_its_shape(weight: Tensor) -> bool:
    """Whether a tensor of a pickle has the memory that its shape claims; a stride of 0 claims any size for nothing."""
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized or weight.is_nested:
        return False
    return math.prod(weight.shape) * weight.element_size() <= weight.untyped_storage().nbytes()
