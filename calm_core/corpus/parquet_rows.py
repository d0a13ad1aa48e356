"""Parquet files, of which the column of the text, and that which decides its split, are read alone."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from calm_core.corpus.compression import open_decompressed
from calm_core.corpus.faults import no_field
from calm_core.corpus.rows import BATCH_ROWS, PIECE_BYTES, Groups, Rows, Texts
from calm_core.corpus.splits import group_of
from calm_core.corpus.text_files import COMPRESSED
from calm_core.corpus.utf8 import require_no_pointer
from calm_core.errors import CalmError, one_line


def parquet_rows(path: Path, field: str, group_field: str | None, row: int = 0) -> Iterator[Rows]:
    """A Parquet file's column ``field``, from ``row`` on; ``group_field`` decides their split, None: the text does."""
    with _seekable(path) as opened, pyarrow.parquet.ParquetFile(opened, buffer_size=PIECE_BYTES) as file:
        _require_columns(file, path, field, group_field)
        if file.metadata.num_rows == 0:  # then there need be no such column
            return
        groups = file.metadata.num_row_groups
        begins = [0, *itertools.accumulate(file.metadata.row_group(group).num_rows for group in range(groups))]
        first = max(group for group in range(groups + 1) if begins[group] <= row)
        number = begins[first]
        columns = [field] if group_field is None else list({field: None, group_field: None})
        for batch in file.iter_batches(BATCH_ROWS, range(first, groups), columns, use_threads=False):
            skipped = max(0, row - number)
            number += len(batch)
            if number > row:
                after, begin = {"row": number}, number - len(batch) + skipped + 1
                texts = _values(batch.column(field)[skipped:], path, begin)
                if group_field is None:
                    yield texts, None, after
                else:
                    values = _values(batch.column(group_field)[skipped:], path, begin)
                    yield texts, groups_of(texts, values, str(path), group_field, begin), after


def groups_of(texts: Texts, values: list[Any], name: str, field: str, first: int) -> Groups:
    """The groups of the rows of ``texts`` by the ``values`` of ``field``; ``first`` is the number of the first row."""
    return [
        group_of(value, f"{name}, row {number:,}", field) if text and not text.isspace() else None
        for number, (text, value) in enumerate(zip(texts, values, strict=True), first)
    ]


def require_columns(path: Path, field: str, group_field: str | None) -> None:
    """Raise CalmError if the Parquet file at ``path``, unless it is packed, is damaged or lacks a column.

    ``field`` has to hold text.
    """
    if not path.name.lower().endswith(COMPRESSED):
        with _seekable(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            _require_columns(file, path, field, group_field)


def _require_columns(file: pyarrow.parquet.ParquetFile, path: Path, field: str, group_field: str | None) -> None:
    schema = file.schema_arrow
    if file.metadata.num_rows == 0:
        return
    if field not in schema.names:
        raise no_field(str(path), field, schema.names)
    if not _holds_text(kind := schema.field(field).type):
        texts = ", ".join(column.name for column in schema if _holds_text(column.type)) or "nowhere"
        raise CalmError(
            f"{path}: field {field!r} holds {kind}, not text; change corpus.text_field (text here: {texts})"
        )
    if group_field is not None and group_field not in schema.names:
        raise no_field(str(path), group_field, schema.names, "split_by")


def _holds_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    # A column of nulls alone has a type of its own.
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def _values(column: pyarrow.Array, path: Path, first: int) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise CalmError(f"{path}, row {number}: the text is not UTF-8 ({one_line(error)})") from None
        raise
    return values


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """``path`` as a file that can be read from its end, as Parquet is: unpacked to the disk if need be."""
    if not path.name.lower().endswith(COMPRESSED):
        with path.open("rb") as file:
            require_no_pointer(file, path)
            yield file
        return
    with open_decompressed(path) as packed, tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(packed, unpacked, PIECE_BYTES)
        unpacked.seek(0)
        yield unpacked
