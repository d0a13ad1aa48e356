"""Parquet files, of which the column of the text alone is read."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from calm_core.corpus.compression import open_decompressed
from calm_core.corpus.faults import no_field
from calm_core.corpus.rows import BATCH_ROWS, PIECE_BYTES, Rows, Texts
from calm_core.corpus.text_files import COMPRESSED
from calm_core.corpus.utf8 import require_no_pointer
from calm_core.errors import CalmError, one_line


def parquet_rows(path: Path, field: str, row: int = 0) -> Iterator[Rows]:
    """A Parquet file's column ``field``, from ``row`` on."""
    with _seekable(path) as opened, pyarrow.parquet.ParquetFile(opened, buffer_size=PIECE_BYTES) as file:
        _require_text(file, path, field)
        if file.metadata.num_rows == 0:  # then there need be no such column
            return
        groups = file.metadata.num_row_groups
        begins = [0, *itertools.accumulate(file.metadata.row_group(group).num_rows for group in range(groups))]
        first = max(group for group in range(groups + 1) if begins[group] <= row)
        number = begins[first]
        for batch in file.iter_batches(BATCH_ROWS, range(first, groups), [field], use_threads=False):
            column = batch.column(field)[max(0, row - number) :]
            number += len(batch)
            if number > row:
                yield _values(column, path, number - len(column) + 1), {"row": number}


def require_column(path: Path, field: str) -> None:
    """Raise CalmError if the Parquet file at ``path``, unless it is packed, is damaged or has no text in ``field``."""
    if not path.name.lower().endswith(COMPRESSED):
        with _seekable(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            _require_text(file, path, field)


def _require_text(file: pyarrow.parquet.ParquetFile, path: Path, field: str) -> None:
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


def _holds_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    # A column of nulls alone has a type of its own.
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def _values(column: pyarrow.Array, path: Path, first: int) -> Texts:
    try:
        values: Texts = column.to_pylist()
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
