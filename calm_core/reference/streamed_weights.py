"""Safetensors files written a piece of a tensor at a time: a checkpoint may be larger than memory.

The bytes are those that safetensors itself writes for the same tensors in the same order, but `save_file` needs all of
them in memory.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.reference.untrusted_weights import PIECE
from calm_core.storage.atomic import move_into_place, scratch_folder

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class StreamedTensor(NamedTuple):
    """What a tensor will be, and its numbers when it is written: flat pieces in their order, of any lengths."""

    dtype: torch.dtype
    shape: Iterable[int]
    pieces: Callable[[], Iterable[Tensor]]


def write_weights(tensors: Mapping[str, StreamedTensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path`` atomically, the widest types first and otherwise in their order.

    Takes the memory of a piece.
    """
    # So that each tensor begins at a multiple of its numbers' size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, shape = end, list(tensor.shape)
        end += tensor.dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with scratch_folder(path.parent) as scratch:
        with (scratch / path.name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, tensor in ordered:
                for piece in tensor.pieces():
                    # numpy knows no bfloat16: bytes, whatever the numbers are.
                    file.write(piece.to(tensor.dtype).contiguous().view(torch.uint8).numpy().data)
        move_into_place(scratch / path.name, path)


def write_model_weights(weights: Mapping[str, Tensor], types: Mapping[str, torch.dtype], folder: Path) -> None:
    """Write ``weights``, each in its one of ``types``, as the model.safetensors that transformers saves in ``folder``.

    They are in memory once, and a tensor of two names is written twice.
    """
    streamed = {
        name: StreamedTensor(types[name], weights[name].shape, partial(weights[name].flatten().split, PIECE))
        for name in sorted(weights)
    }
    write_weights(streamed, folder / "model.safetensors", metadata={"format": "pt"})
