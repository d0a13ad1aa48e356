"""Artefacts are written whole or not at all: into a sibling of the final place, then renamed."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_core.errors import CalmError

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file, at most: far more than any of this project's."""


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A fresh folder that becomes ``path``, in place of what stood there, once the block ends without an error.

    If the block raises, ``path`` stays as it was and the fresh folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that ``path`` holds; raises CalmError where it is missing or damaged.

    NaN and numbers beyond a float's range are no JSON, though Python reads and writes them.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CalmError(f"{path} has more than {LARGEST_JSON:,} bytes; delete it and run `dvc repro`")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise CalmError(f"{path} is missing; `dvc repro` makes it") from None
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CalmError(f"{path} is damaged; delete it and run `dvc repro`") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def sha256(path: Path) -> str:
    """SHA-256 of the file at ``path``, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disk_space(path: Path, needed_bytes: int, purpose: str) -> None:
    """Raise CalmError unless the file system of ``path`` has room for ``needed_bytes``."""
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CalmError(
            f"{purpose} need {needed_bytes / 1e6:,.0f} MB in {path} but {free / 1e6:,.0f} MB are free; "
            "free some disk space or lower corpus.documents or autoencoder.latent_size"
        )
