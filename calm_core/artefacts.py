"""Artefacts are written whole or not at all: into a sibling of the final place, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_core.errors import CalmError


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
    """The value that ``path`` holds; raises CalmError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CalmError(f"{path} is missing; `dvc repro` makes it") from None
    except ValueError:
        raise CalmError(f"{path} is damaged; delete it and run `dvc repro`") from None


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
