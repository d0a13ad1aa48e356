"""Local files read as bytes, decompressed by their ending; one that was cut short or ends in something else fails.

Python's own files of bzip2 and xz end in silence at bytes that they do not know, where the next stream may have stood;
Arrow's knows no empty stream of bzip2, and the package zstandard takes the part of a file for a file.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

BUFFER_BYTES = 1 << 16


@contextmanager
def open_decompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The content of ``path`` as a binary file, all streams of a compressed one after each other.

    Opening and reading raise OSError, EOFError and whatever else the decompressor of this ending has.
    """
    with io.BufferedReader(path.open("rb", 0), BUFFER_BYTES) as packed:
        opened = _decompressor(packed, path.suffix.lower())
        if opened is packed:
            yield packed
            return
        if not packed.peek(1):
            raise EOFError("a compressed file is never empty")
        with io.BufferedReader(opened, BUFFER_BYTES) as file:
            yield file


def _decompressor(packed: BinaryIO, ending: str) -> Any:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=packed)
    if ending == ".bz2":
        return _Streams(packed, bz2.BZ2Decompressor)
    if ending == ".xz":
        return _Streams(packed, lzma.LZMADecompressor, filled=True)
    return pyarrow.CompressedInputStream(packed, "zstd") if ending == ".zst" else packed


class _Streams(io.RawIOBase):
    """The compressed streams of a file one after another; xz allows it to be ``filled`` with zeros, in fours."""

    def __init__(self, packed: BinaryIO, decompressor: Callable[[], Any], filled: bool = False) -> None:
        self._packed, self._decompressor, self._filled = packed, decompressor, filled
        self._stream = decompressor()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof and not self._next_stream():
                return 0
            if self._stream.needs_input and not self._pending:
                self._pending = self._packed.read(BUFFER_BYTES)
                if not self._pending:
                    raise EOFError("the compressed file ends inside a stream")
            content = self._stream.decompress(self._pending, len(buffer))
            self._pending = b""
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _next_stream(self) -> bool:
        pending, zeros = self._stream.unused_data or self._packed.read(BUFFER_BYTES), 0
        while self._filled and pending.startswith(b"\0"):
            rest = pending.lstrip(b"\0")
            zeros += len(pending) - len(rest)
            pending = rest or self._packed.read(BUFFER_BYTES)
        if zeros % 4:
            raise EOFError("zeros after a stream, but not in fours")
        if pending:
            self._stream, self._pending = self._decompressor(), pending
        return bool(pending)
