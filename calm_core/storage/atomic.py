"""Files and folders are written whole or not at all: somewhere else first, then renamed.

A rename is one step for the file system, so whoever reads a path finds what stood there before or all of what is new,
whenever the writing process was killed. ``move_into_place`` also has the content on the disk before it has its name.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
