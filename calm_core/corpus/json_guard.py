"""Whether a file of JSON is safe to give to Arrow, which reads it for `datasets`.

Arrow calls itself once for each level that JSON nests, and reads no `null` where a block's first object should be:
either kills the process without a word. So files are looked through before, at some 500 MB/s.
"""

import json
from pathlib import Path

from calm_core.corpus.compression import open_decompressed
from calm_core.errors import CalmError, one_line

MOST_LEVELS = 500
"""What is accepted; Arrow can do some thousand."""

_OPEN, _CLOSE = b"[{", b"]}"


def require_objects(path: Path) -> None:
    """Raise CalmError unless JSON in ``path``, compressed or not, is objects of at most ``MOST_LEVELS`` levels.

    A file may also be one list of objects or of strings, which is read whole, here as by `datasets`. Where it cannot be
    decompressed, that error comes.
    """
    depth = 0
    with open_decompressed(path) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if number == 1 and content.startswith(b"["):
                return _require_list(content + file.read(), path)
            if depth == 0 and content.strip() and not content.lstrip().startswith(b"{"):
                raise CalmError(f"{path} cannot be read as json: line {number} is no object")
            outside = _outside_strings(content)
            opened = sum(outside.count(byte) for byte in _OPEN)
            if depth + opened > MOST_LEVELS and depth + _levels(outside) > MOST_LEVELS:
                raise CalmError(f"{path} cannot be read as json: line {number} nests more than {MOST_LEVELS} levels")
            depth = max(0, depth + opened - sum(outside.count(byte) for byte in _CLOSE))


def _require_list(content: bytes, path: Path) -> None:
    try:
        # Each value becomes a line of its own for Arrow, null too.
        empty = None in json.loads(content.decode(), strict=False)
    except UnicodeDecodeError as error:
        raise CalmError(f"{path} is not UTF-8 text (byte {error.start}); convert it, for instance with iconv") from None
    except (ValueError, RecursionError) as error:
        raise CalmError(f"{path} cannot be read as json: {one_line(error)}") from None
    if empty:
        raise CalmError(f"{path} cannot be read as json: null stands where an object should")


def _outside_strings(line: bytes) -> bytes:
    if b"\\" in line:
        line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(line.split(b'"')[::2])


def _levels(outside: bytes) -> int:
    deepest = depth = 0
    for byte in outside:
        depth += (byte in _OPEN) - (byte in _CLOSE)
        deepest = max(deepest, depth)
    return deepest
