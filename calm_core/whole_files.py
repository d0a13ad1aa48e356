"""Safetensors files are written whole or not at all, and are on the disk before they have their name.

What reads them runs nothing that they hold, and takes no memory that they only claim to fill.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.errors import CalmError, one_line


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder`` for files that are not whole yet; whatever is left in it goes at the end.

    Libraries put temporary files of their own beside what they write. A killed process leaves them here, where the
    next one removes them.
    """
    scratch = folder / ".new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors``, contiguous and on the CPU, to ``path``; what stood there stays until the file is whole."""
    with scratch_folder(path.parent) as scratch:
        save_file(dict(tensors), scratch / path.name, dict(metadata) if metadata else None)
        move_into_place(scratch / path.name, path)


def load_tensors(path: Path, remedy: str = "delete it and run `dvc repro`") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, memory-mapped.

    Raises:
        CalmError: it is missing, or its header does not go with its content; ends in ``remedy``.
    """
    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # beside SafetensorError, whatever torch says of types and shapes that it lacks
        raise damaged(path, error, remedy) from None


def damaged(path: Path, error: Exception, remedy: str = "delete it and run `dvc repro`") -> CalmError:
    """What a user is told where reading ``path`` failed with ``error``."""
    return CalmError(f"{path} is missing or damaged ({one_line(error)}); {remedy}")


def move_into_place(fresh: Path, path: Path) -> None:
    """Rename ``fresh``, on the same file system, to ``path``: its content first, then its name reach the disk."""
    _reach_disk(fresh)
    os.replace(fresh, path)
    _reach_disk(path.parent)


def _reach_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems know no fsync of folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
