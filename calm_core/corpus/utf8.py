"""Files of UTF-8: opened at any byte, decoded, and refused with the place of what is not UTF-8."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calm_core.corpus.compression import open_decompressed
from calm_core.corpus.rows import PIECE_BYTES
from calm_core.errors import CalmError


@contextmanager
def opened_utf8(path: Path, byte: int) -> Iterator[io.BufferedReader]:
    """The content of a file of UTF-8, from ``byte`` on."""
    with open_decompressed(path) as file:
        require_no_pointer(file, path)
        _require_no_utf16(file, path)
        if file.seekable():
            file.seek(byte)
        else:
            while byte > 0 and (skipped := file.read(min(byte, PIECE_BYTES))):
                byte -= len(skipped)
        yield file


def require_no_pointer(file: io.BufferedReader, path: Path) -> None:
    """Raise CalmError if ``file`` is what Git LFS puts in the place of a file that it has not fetched."""
    if file.peek(1).startswith(b"version https://git-lfs.github.com/spec/"):
        raise CalmError(f"{path} is a pointer of Git LFS, not the file itself; fetch that: git lfs pull")


def _require_no_utf16(file: io.BufferedReader, path: Path) -> None:
    head = file.peek(1)
    # Without its mark UTF-16 of plain letters would be UTF-8 too, all even or all odd bytes zeros.
    even, odd = head[::2].count(0), head[1::2].count(0)
    unmarked = len(head) >= 8 and min(even, odd) == 0 and 3 * max(even, odd) > len(head)
    if unmarked or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CalmError(f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")


def decoded(content: bytes, path: Path, byte: int, line: int) -> str:
    """``content``, which begins at ``byte`` in ``line`` of ``path``, as text without a byte order mark."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        at, line = byte + error.start, line + content.count(b"\n", 0, error.start)
        raise CalmError(
            f"{path} is not UTF-8 text (byte {at}, 0x{content[error.start]:02x} in line {line}); convert it, for "
            "instance: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from None
    return text.removeprefix("\ufeff") if byte == 0 else text
