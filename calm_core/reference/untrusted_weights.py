"""A checkpoint from elsewhere, read without trust: config.json, and tensors by name.

Weights come from safetensors, whole or in shards, or from a .bin read with ``weights_only``: nothing in it is run, and
none of it takes more memory than the file has.

Notable: no tensor is in memory until it is asked for, and then a piece at a time. A safetensors file is read, not
mapped: what a process has seen of a mapping counts as its memory. A .bin has to be unpickled as a whole, which maps it
(``mmap``): one at a time, and anew after every so many bytes.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calm_core.errors import CalmError, single_line
from calm_core.storage.json_io import read_json
from calm_core.storage.tensors import damaged

PIECE = 1 << 20
"""Numbers of a tensor that are in memory together."""

MAPPED = 1 << 26
"""Bytes of a .bin that are read before it is mapped anew."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the types that weights here may have."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its place, type and shape, and its numbers on demand."""

    path: Path
    dtype: torch.dtype | str
    """The name in the file where it is none of float64, float32, float16 and bfloat16."""
    shape: tuple[int, ...]
    start: int
    """Where it stands in its file, in bytes; of a .bin its number there."""
    _pickles: "Pickles | None" = field(default=None, compare=False, repr=False)
    _name: str = ""

    def pieces(self) -> Iterator[Tensor]:
        """Its numbers in their order, flat, ``PIECE`` at a time, in the type of the file.

        Raises:
            CalmError: the file has changed since, or cannot be read any more.
        """
        if self._pickles is not None:
            yield from self._pickles.pieces(self.path, self._name)
            return
        assert isinstance(self.dtype, torch.dtype)
        size = math.prod(self.shape)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                for first in range(0, size, PIECE):
                    content = bytearray(min(PIECE, size - first) * self.dtype.itemsize)
                    if file.readinto(content) != len(content):
                        raise CalmError(f"{self.path} ends in the middle of a tensor; fetch it again")
                    yield torch.frombuffer(content, dtype=self.dtype)
        except OSError as error:
            raise damaged(self.path, error, "fetch it again") from None


Stored = dict[str, StoredTensor]


def read_checkpoint(folder: Path, pickles: "Pickles") -> tuple[dict[str, Any], Stored]:
    """config.json and all tensors of a checkpoint in ``folder``; raises CalmError where they cannot be read.

    ``pickles`` is one for all checkpoints that are read together.
    """
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
        return config, _stored(path, pickles)
    shards = read_mapping(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CalmError(f"{path} names no shards: it has no weight_map")
    weights: Stored = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        # An index comes from elsewhere, too: a name with a folder in it could read any file.
        if Path(name).name != name or name in ("", ".."):
            raise CalmError(f"{path} names the shard {name!r}, which lies outside its folder")
        for tensor, weight in _stored(folder / name, pickles).items():
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


def _stored(path: Path, pickles: "Pickles") -> Stored:
    if path.suffix == ".safetensors":
        return _in_safetensors(path)
    return {
        name: StoredTensor(path, weight.dtype, tuple(weight.shape), number, pickles, name)
        for number, (name, weight) in enumerate(pickles.tensors(path).items())
    }


def _in_safetensors(path: Path) -> Stored:
    try:
        # Validates the header, and the file's length against it.
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
        return {
            name: StoredTensor(
                path,
                _DTYPES.get(tensor["dtype"], tensor["dtype"]),
                tuple(tensor["shape"]),
                8 + length + tensor["data_offsets"][0],
            )
            for name, tensor in header.items()
            if name in names
        }
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and what the system and torch raise
        raise damaged(path, error, "fetch it again") from None


class Pickles:
    """The tensors of .bin files, of one file at a time."""

    def __init__(self) -> None:
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        self._is_mapped = False
        self._seen = 0  # bytes of the mapping

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors in ``path``; the file that was asked for before is closed."""
        if self._open is None or self._open[0] != path:
            self._open, self._seen = None, 0  # before the next is there
            weights, self._is_mapped = _unpickled(path)
            self._open = (path, weights)
        return self._open[1]

    def pieces(self, path: Path, name: str) -> Iterator[Tensor]:
        """Copies of the numbers of a tensor, flat, ``PIECE`` at a time."""
        weight = self.tensors(path)[name]
        if not weight.is_contiguous():  # never so in what models save: its numbers in their order are a copy
            yield from weight.reshape(-1).split(PIECE)
            return
        size = weight.numel()
        del weight  # a mapping lasts as long as any tensor of it
        for first in range(0, size, PIECE):
            piece = self.tensors(path)[name].view(-1)[first : first + PIECE].clone()
            self._seen += piece.nbytes
            if self._is_mapped and self._seen >= MAPPED:
                self._open = None
            yield piece


def _unpickled(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors in ``path``, and whether they are mapped."""
    try:
        # What torch wrote before its archives cannot be mapped.
        is_archive = _require_stored(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CalmError:
        raise
    except pickle.UnpicklingError:  # its text advises to read the file with trust
        raise CalmError(f"{path} cannot be read: it is damaged, or holds more than tensors by name") from None
    except OSError as error:
        raise damaged(path, error, "fetch it again") from None
    except Exception as error:  # the unpickler fails in as many ways as there are bytes, for want of memory too
        # With its type: of a key that is not there the message is a mere number.
        told = single_line(f"{type(error).__name__}: {error}").removesuffix(":")
        raise CalmError(f"{path} cannot be read: it is damaged ({told}); fetch it again") from None
    advice = "the weights of a model are needed, a state_dict that torch.save wrote, not a training state"
    if not isinstance(weights, dict):
        raise CalmError(f"{path} holds a {type(weights).__name__}, no tensors by name; {advice}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise CalmError(f"{path} holds {name!r} of type {type(weight).__name__}, no tensor; {advice}")
        if not isinstance(name, str) or not _fills_its_shape(weight):
            raise CalmError(f"{path}: {name!r} is no plain tensor with a number for each place")
    return weights, is_archive


def _require_stored(path: Path) -> bool:
    """Whether ``path`` is an archive; raises CalmError if it is compressed, as torch writes none.

    A small compressed one can fill all memory.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        sizes = [(entry.file_size, entry.compress_size) for entry in archive.infolist()]
    # Also the sum: entries of an archive may overlap, and then claim more bytes than the file has.
    if any(size != stored for size, stored in sizes) or sum(size for size, _ in sizes) > path.stat().st_size:
        raise CalmError(f"{path} cannot be read: its archive is compressed, which torch.save does not do")
    return True


def _fills_its_shape(weight: Tensor) -> bool:
    """Whether a tensor of a pickle has the memory that its shape claims; a stride of 0 claims any size for nothing."""
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized or weight.is_nested:
        return False
    return math.prod(weight.shape) * weight.element_size() <= weight.untyped_storage().nbytes()
