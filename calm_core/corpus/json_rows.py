"""Files of JSON, of whose rows only the text and what decides its split are looked at: other fields do not matter.

Python's own reader takes a line at a time, tells the place of a mistake, and refuses what nests too deeply, where
Arrow's kills the process.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calm_core.corpus.faults import no_field
from calm_core.corpus.rows import BATCH_ROWS, Groups, Rows, Texts, in_batches
from calm_core.corpus.splits import group_of
from calm_core.corpus.utf8 import decoded, opened_utf8
from calm_core.errors import CalmError

MOST_FIELDS = 100
"""Names of fields that are collected for a message, about."""

_SPACES = re.compile(r"[ \t\n\r]*")


Row = tuple[str | None, str | None]
"""Text and group."""


def json_rows(path: Path, field: str, group_field: str | None, byte: int = 0, line: int = 1) -> Iterator[Rows]:
    """A file of one JSON object a line or, read as a whole, of one list, or of objects over several lines (.json)."""
    rows = JsonRows(str(path), field, group_field, found=byte > 0)
    with opened_utf8(path, byte) as file:
        if byte == 0 and _is_whole(file, path):
            for batch in in_batches(rows.of_whole(decoded(file.read(), path, 0, 1))):
                yield *rows.columns(batch), None
        else:
            while lines := list(itertools.islice(file, BATCH_ROWS)):
                read: list[Row] = []
                for content in lines:
                    if content and not content.isspace():
                        text = decoded(content, path, byte, line)
                        read.append(rows.of_line(text, line, ended=content.endswith(b"\n")))
                    byte, line = byte + len(content), line + 1
                # A file is known to have the field once a row has it, so it can be resumed from there on alone.
                yield *rows.columns(read), {"byte": byte, "line": line} if rows.found else None
    rows.require_field()


def _is_whole(file: io.BufferedReader, path: Path) -> bool:
    """Whether a file of JSON has to be read as a whole: it is a list, or its first line is no value by itself."""
    head = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head or head.startswith(b"["):
        return head.startswith(b"[")
    if ".json" not in (path.suffix.lower(), Path(path.stem).suffix.lower()):
        return False
    first, newline, _ = head.partition(b"\n")
    if not newline:  # longer than what was looked at: one object in one line, or one of many
        return False
    try:
        json.loads(first, strict=False)
    except (ValueError, RecursionError):
        return True
    return False


class JsonRows:
    """The text ``field`` of the rows in a file or dataset called ``name``; ``found``: a row is known to have it.

    ``group_field`` decides the split of a row; None: its text does.
    """

    # Numbers as floats: an integer of any length is read in a column that does not matter.
    _decoder = json.JSONDecoder(parse_int=float, strict=False)

    def __init__(self, name: str, field: str, group_field: str | None, found: bool) -> None:
        self.found = found
        self._name, self._field, self._group_field = name, field, group_field
        self._fields: dict[str, None] = {}

    def columns(self, rows: list[Row]) -> tuple[Texts, Groups]:
        """Texts and groups of ``rows``."""
        return [text for text, _ in rows], [group for _, group in rows] if self._group_field is not None else None

    def of_line(self, text: str, line: int, ended: bool) -> Row:
        """The text in the object of line number ``line``, which ``ended`` with a newline or with the file."""
        try:
            row = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            ends = "" if ended or error.msg == "Extra data" else "; the file ends in this line, cut short?"
            raise self._error(f"line {line}, column {error.colno}: {error.msg}{ends}") from None
        except RecursionError:
            raise self._error(f"line {line} nests too many levels") from None
        return self._row(row, f"line {line}", "\\u" in text)

    def of_whole(self, text: str) -> Iterator[Row]:
        """The texts in the one list, or the objects, that ``text`` holds."""
        at, escapes = _after_spaces(text, 0), "\\u" in text
        try:
            while at < len(text):
                value, end = self._decoder.raw_decode(text, at)
                at = _after_spaces(text, end)
                if isinstance(value, list):
                    if at < len(text):
                        raise json.JSONDecodeError("Extra data", text, at)
                    for number, row in enumerate(value, 1):
                        self.found = self.found or isinstance(row, str)
                        fields = {self._field: row} if isinstance(row, str) else row
                        yield self._row(fields, f"entry {number}", escapes)
                else:
                    line = text.count("\n", 0, end) + 1
                    yield self._row(value, f"the value that ends in line {line}", escapes)
        except json.JSONDecodeError as error:
            raise self._error(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise self._error("it nests too many levels") from None

    def require_field(self) -> None:
        """Raise CalmError if there were rows, none of which had the field."""
        if self._fields and not self.found:
            raise no_field(self._name, self._field, self._fields)

    def _row(self, row: Any, place: str, escapes: bool) -> Row:
        if not isinstance(row, dict):
            raise self._error(f"{place} holds {_kind(row)}, no object")
        if not self.found:
            if len(self._fields) < MOST_FIELDS:
                self._fields.update(dict.fromkeys(row))
            self.found = self._field in row
        value = row.get(self._field)
        if value is None:
            return None, None
        if not isinstance(value, str):
            texts = ", ".join(name for name, other in row.items() if isinstance(other, str)) or "nowhere"
            raise CalmError(
                f"{self._name}, {place}: field {self._field!r} holds {_kind(value)}, not text; change "
                f"corpus.text_field (text here: {texts})"
            )
        if escapes:  # the one way in which JSON can hold half a character
            _require_characters(value, f"{self._name}, {place}")
        return value, self._group(row, value, f"{self._name}, {place}")

    def _group(self, row: dict[str, Any], text: str, name: str) -> str | None:
        # A row without text is no document, and needs no group.
        if self._group_field is None or not text or text.isspace():
            return None
        if self._group_field not in row:
            raise no_field(name, self._group_field, row, "split_by")
        return group_of(row[self._group_field], name, self._group_field)

    def _error(self, message: str) -> CalmError:
        return CalmError(f"{self._name} cannot be read as json: {message}")


def _after_spaces(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    assert found
    return found.end()


def _kind(value: Any) -> str:
    names = {bool: "true or false", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _require_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise CalmError(f"{place}: the text holds {half}, half a character, which UTF-8 has not; repair it") from None
