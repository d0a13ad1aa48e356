"""The texts of the files of a corpus, one file after the other, as a stream that can begin inside a file."""

from collections.abc import Iterator
from pathlib import Path

from calm_core.corpus.faults import told_of
from calm_core.corpus.json_rows import json_rows
from calm_core.corpus.parquet_rows import parquet_rows, require_columns
from calm_core.corpus.plain_text import text_rows
from calm_core.corpus.rows import Position, Rows, Table
from calm_core.corpus.text_files import file_format, file_names, told_source_files
from calm_core.errors import CalmError
from calm_core.params import CorpusParams


def file_tables(corpus: CorpusParams, first: int, position: Position | None) -> Iterator[Table]:
    """The texts of ``source_files``, from ``position`` in file number ``first`` on."""
    files = list(enumerate(told_source_files(corpus)))[first:]
    by_file = corpus.split_unit == "file"
    group_field = None if corpus.split_unit in ("document", "file") else corpus.split_unit
    for _, path in files:  # what can be known before hours of work
        if group_field is not None and file_format(path) == "text":
            raise CalmError(
                f"{path} is text and has no field {group_field!r}; corpus.split_by can be: auto, document, file"
            )
        if file_format(path) == "parquet":
            with told_of(path):
                require_columns(path, corpus.text_field, group_field)
    names = file_names(corpus) if by_file else []
    for number, path in files:
        start = (position if number == first else None) or {}
        with told_of(path):
            for texts, groups, after in _read(path, corpus, group_field, start):
                yield Table(texts, names[number] if by_file else groups, (number, after) if after else None)
        yield Table([], None, (number + 1, None))


def _read(path: Path, corpus: CorpusParams, group_field: str | None, start: Position) -> Iterator[Rows]:
    kind = file_format(path)
    if kind == "parquet":
        return parquet_rows(path, corpus.text_field, group_field, **start)
    if kind == "json":
        return json_rows(path, corpus.text_field, group_field, **start)
    return text_rows(path, corpus.text_unit, **start)
