"""Atomic writes: files and folders are written under a temporary name, then renamed.

A rename is atomic, so a reader finds the old content or all of the new, even if the writer is killed.
``move_into_place`` also survives a crash of the machine: it flushes the content to disk before the rename.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A fresh folder that replaces ``path`` once the block ends without an error.

    If the block raises, ``path`` stays as it was and the fresh folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside ``path``, since a rename works within one file system only.
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    # Two renames, since none replaces a folder that is not empty. Between them ``path`` is missing, never half written.
    if path.exists():
        try:
            path.rename(old)
        except OSError as error:
            # So do containers' file systems refuse to rename a folder that came with the image.
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(path)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(content)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder`` for unfinished files; it is removed at the end with all that is left in it.

    Libraries create temporary files of their own beside what they write. Those of a killed process are here, too, and
    the next one removes them.
    """
    scratch = folder / ".new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into_place(fresh: Path, path: Path) -> None:
    """Rename ``fresh``, on the same file system, to ``path``: flushes the content, renames, flushes the folder."""
    _reach_disk(fresh)
    os.replace(fresh, path)
    # The name is an entry of the folder, which has to be flushed as well.
    _reach_disk(path.parent)


def _reach_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync, most of those not of folders.
        if not path.is_dir() and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
