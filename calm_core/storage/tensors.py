"""Safetensors files: written atomically, and read without trust.

Reading runs no code from a file, and allocates no memory for sizes that a file merely claims.
"""

import errno
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.errors import CalmError, one_line
from calm_core.storage.atomic import move_into_place, scratch_folder

Expected = Mapping[str, tuple[int, tuple[str, ...]]]
"""The number of dimensions of each tensor of a file, and what its numbers may be: "int32", "float16", ..."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors``, contiguous and on the CPU, to ``path`` atomically."""
    with scratch_folder(path.parent) as scratch:
        save_file(dict(tensors), scratch / path.name, dict(metadata) if metadata else None)
        move_into_place(scratch / path.name, path)


def load_tensors(path: Path, remedy: str = "delete it and run `dvc repro`") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, memory-mapped.

    Raises:
        CalmError: it is missing, or its header contradicts its content; the message ends in ``remedy``.
    """
    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and what torch raises for dtypes and shapes that it lacks
        raise damaged(path, error, remedy) from None


def damaged(path: Path, error: Exception, remedy: str = "delete it and run `dvc repro`") -> CalmError:
    """The error for a user when reading ``path`` failed with ``error``."""
    told = one_line(error)
    # What the system refuses is no fault of the file; safetensors tells the system's error in its message alone.
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        if "os error 19" in told or error.errno == errno.ENODEV:
            told += ", its file system maps no files into memory; move the project to another"
        return CalmError(f"{path} cannot be read: {told}")
    return CalmError(f"{path} is missing or damaged ({told}); {remedy}")


def read_tensors(path: Path, expected: Expected) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped.

    Raises:
        CalmError: it is missing or damaged, or holds other tensors than ``expected``.
    """
    tensors = load_tensors(path)
    found = {name: (tensor.ndim, str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    require_tensors(path, found, expected)
    return tensors


def require_tensors(path: Path, found: Mapping[str, tuple[int, str]], expected: Expected) -> None:
    """Raise CalmError unless ``found``, dimensions and dtype of each tensor by name, is what is ``expected``."""
    # Neither more nor fewer tensors: another layout of the same file is not guessed at.
    right = found.keys() == expected.keys() and all(
        found[name][0] == dimensions and found[name][1] in dtypes for name, (dimensions, dtypes) in expected.items()
    )
    if not right:
        shown = ", ".join(f"{name} [{ndim} dimensions, {dtype}]" for name, (ndim, dtype) in sorted(found.items()))
        raise CalmError(f"{path} holds {shown or 'nothing'}, not {', '.join(expected)}; delete it and run `dvc repro`")
