"""Text files (.txt, .md): a document, a paragraph or a line is a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from calm_core.corpus.faults import told_of
from calm_core.corpus.rows import PIECE_BYTES, Rows
from calm_core.corpus.utf8 import decoded, opened_utf8


def text_rows(path: Path, unit: str, byte: int = 0, line: int = 1) -> Iterator[Rows]:
    """A text file's documents, paragraphs (what stands between empty lines) or lines; line ends become newlines."""
    with opened_utf8(path, byte) as file:
        if unit == "document":
            yield [_newlines(decoded(file.read(), path, byte, line))], None, None
            return
        for piece in _pieces(file, unit):
            text = _newlines(decoded(piece, path, byte, line))
            parts = text.split("\n") if unit == "line" else [part.strip("\n") for part in text.split("\n\n")]
            byte, line = byte + len(piece), line + piece.count(b"\n")
            yield [part for part in parts if part and not part.isspace()], None, {"byte": byte, "line": line}


def count_units(paths: list[Path], most: int) -> dict[str, int]:
    """How many paragraphs and lines the text files hold; reads no further than to ``most`` lines."""
    counts = {"paragraph": 0, "line": 0}
    for path in paths:
        begun = False
        with told_of(path), opened_utf8(path, 0) as file:
            for line in file:
                if line.strip():
                    counts["line"] += 1
                    counts["paragraph"] += not begun
                begun = bool(line.strip(b"\r\n")) and (begun or bool(line.strip()))
                if counts["line"] == most:
                    return counts
    return counts


def _pieces(file: BinaryIO, unit: str) -> Iterator[bytes]:
    """Pieces of ``PIECE_BYTES`` or more that end with a line, or with a paragraph."""
    while piece := file.read(PIECE_BYTES):
        lines = [piece, file.readline()]
        while unit == "paragraph" and (line := file.readline()):
            lines.append(line)
            if not line.strip(b"\r\n"):
                break
        yield b"".join(lines)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
