"""Where two runs differ: the artefacts, and in each the first tensor, value or line that is not the same."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calm_core.storage.checksum import sha256


def differences(first: Path, second: Path) -> Iterator[str]:
    """A line for each file that the folders ``first`` and ``second`` do not both hold with the same bytes."""
    names = {
        str(path.relative_to(folder)) for folder in (first, second) for path in folder.rglob("*") if path.is_file()
    }
    for name in sorted(names):
        paths = first / name, second / name
        missing = [path for path in paths if not path.is_file()]
        if missing:
            yield f"{name}: only in {next(path for path in paths if path not in missing)}"
        elif sha256(paths[0]) != sha256(paths[1]):
            yield f"{name}: {first_difference(*paths)}"


def first_difference(first: Path, second: Path) -> str:
    """What differs first in two files of different bytes, in words."""
    try:
        if first.suffix == ".safetensors":
            return _first_tensor(first, second)
        texts = [path.read_text(encoding="utf-8") for path in (first, second)]
        if first.suffix == ".json":
            return _first_value(*(json.loads(text) for text in texts))
        return _first_line(*(text.splitlines() for text in texts))
    except (ValueError, RuntimeError):  # neither text nor tensors
        return "other bytes"


def _first_tensor(first: Path, second: Path) -> str:
    with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
        names, others = list(a.keys()), set(b.keys())
        for name in names:
            if name not in others:
                return f"tensor {name} is in the first alone"
            found = _tensor_difference(a.get_tensor(name), b.get_tensor(name))
            if found:
                return f"tensor {name} {found}"
        if others - set(names):
            return f"tensor {min(others - set(names))} is in the second alone"
        return "the same tensors, other metadata"


def _tensor_difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    bits = (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).flatten() if a.numel() else a.bool()
    if not bits.any():
        return ""
    per_value = bits.view(a.numel(), -1).any(dim=-1)
    position = int(per_value.int().argmax())
    values = f"{a.flatten()[position].item():.9g} and {b.flatten()[position].item():.9g}"
    largest = (a.double() - b.double()).abs().max().item()
    return f"differs in {int(per_value.sum()):,} of {a.numel():,} values, first {values}, most by {largest:.3g}"


def _first_value(a: Any, b: Any, where: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        key = next((key for key in a if a[key] != b[key]), None)
        return "the same values, other layout" if key is None else _first_value(a[key], b[key], f"{where}.{key}")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        index = next((index for index in range(len(a)) if a[index] != b[index]), None)
        return "the same values" if index is None else _first_value(a[index], b[index], f"{where}[{index}]")
    return f"{where.lstrip('.') or 'the value'} is {_short(a)} and {_short(b)}"


def _first_line(a: list[str], b: list[str]) -> str:
    for number, (line, other) in enumerate(zip(a, b, strict=False), start=1):
        if line != other:
            matcher = difflib.SequenceMatcher(None, line[:1000], other[:1000])
            start = max(0, next(code[1] for code in matcher.get_opcodes() if code[0] != "equal") - 20)
            return f"line {number} has {_short(line[start:])} and {_short(other[start:])}"
    return f"{len(a)} and {len(b)} lines"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
