"""The texts of the files of a corpus, one file after the other, as a stream that can begin inside a file."""

from collections.abc import Iterator
from pathlib import Path

from calm_core.corpus.faults import told_of
from calm_core.corpus.json_rows import json_rows
from calm_core.corpus.parquet_rows import parquet_rows, require_column
from calm_core.corpus.plain_text import text_rows
from calm_core.corpus.rows import Position, Rows, Table
from calm_core.corpus.text_files import file_format, told_source_files
from calm_core.params import CorpusParams


def file_tables(corpus: CorpusParams, first: int, position: Position | None) -> Iterator[Table]:
    """The texts of ``source_files``, from ``position`` in file number ``first`` on."""
    files = list(enumerate(told_source_files(corpus)))[first:]
    for _, path in files:
        if file_format(path) == "parquet":  # whose columns can be known before hours of work
            with told_of(path):
                require_column(path, corpus.text_field)
    for number, path in files:
        start = (position if number == first else None) or {}
        with told_of(path):
            for texts, after in _read(path, corpus, start):
                yield Table(texts, (number, after) if after else None)
        yield Table([], (number + 1, None))


def _read(path: Path, corpus: CorpusParams, start: Position) -> Iterator[Rows]:
    kind = file_format(path)
    if kind == "parquet":
        return parquet_rows(path, corpus.text_field, **start)
    if kind == "json":
        return json_rows(path, corpus.text_field, **start)
    return text_rows(path, corpus.text_unit, **start)
