"""Local files read as bytes, decompressed by their ending; one that was cut short or ends in something else fails.

The bzip2 and xz files of Python's library end in silence before what they cannot read, where another stream may have
stood, and the package zstandard takes the part of a file for a file. So bzip2 and zstd are Arrow's here.
"""

import gzip
import io
import lzma
from collections.abc import Iterator
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
    with path.open("rb", BUFFER_BYTES) as packed:
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
    if ending == ".xz":
        return _XzStreams(packed)
    codec = {".bz2": "bz2", ".zst": "zstd"}.get(ending)
    return pyarrow.CompressedInputStream(packed, codec) if codec else packed


class _XzStreams(io.RawIOBase):
    """The streams of an xz file; between them and at its end there may be zeros in fours, as the format allows."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
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
        pending, zeros = self._stream.unused_data, 0
        while True:
            pending = pending or self._packed.read(BUFFER_BYTES)
            rest = pending.lstrip(b"\0")
            zeros += len(pending) - len(rest)
            if rest or not pending:
                break
            pending = b""
        if zeros % 4:
            raise lzma.LZMAError("zeros between xz streams are no multiple of four")
        if rest:
            self._stream, self._pending = lzma.LZMADecompressor(lzma.FORMAT_XZ), rest
        return bool(rest)
