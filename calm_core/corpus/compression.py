"""Local files read as bytes, decompressed by their ending, as `datasets` reads them: by fsspec."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec.utils
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of files that are decompressed; the last one where ``can_decompress`` says so."""

BUFFER_BYTES = 1 << 16


def can_decompress(ending: str) -> bool:
    """Whether the package that ``ending``, one of ``COMPRESSED``, needs is installed.

    For .zst that is backports.zstd before Python 3.14. The package zstandard does, too, but takes a file that was cut
    off for a shorter one.
    """
    return ending.removeprefix(".") in fsspec.utils.compressions


@contextmanager
def open_decompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The content of ``path`` as a binary file.

    Opening and reading raise OSError, EOFError and whatever else the decompressor of this ending has.
    """
    # By ``fsspec.open`` a name with "::", "://" or "~" would be one of other places.
    with OpenFile(LocalFileSystem(), str(path.absolute()), compression="infer") as file:
        yield io.BufferedReader(file, BUFFER_BYTES)  # not all decompressors read lines
