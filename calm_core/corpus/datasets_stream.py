"""A dataset of the Hugging Face hub, or a folder that `datasets` understands, as a stream of its texts.

As from files, nothing but the text, and what decides its split, is read of Parquet and of lines of JSON: other columns
may differ from file to file, and hostile JSON never comes to Arrow, which it could crash.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.json.json import JsonConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.packaged_modules.text.text import Text

from calm_core.corpus.faults import no_field
from calm_core.corpus.json_rows import JsonRows
from calm_core.corpus.parquet_rows import groups_of
from calm_core.corpus.rows import BATCH_ROWS, PIECE_BYTES, Groups, Position, Table, Texts
from calm_core.errors import CalmError, one_line
from calm_core.params import CorpusParams

# It would tell a server of each file of the user's that it opens, and wait for seconds where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def dataset_tables(corpus: CorpusParams, position: Position | None) -> Iterator[Table]:
    """The texts of the dataset that ``corpus`` names, from ``position`` on, which was read before."""
    name, row = f"dataset {corpus.dataset!r}", 0
    stream, is_json_lines = _open(corpus)
    # Arrow tables of a few rows: one row at a time, datasets takes longer than the tokenizer does for a short text.
    tables = stream.with_format("arrow")
    if position is not None:
        row = position["rows"]
        tables.load_state_dict(position["stream"])
    group_field = _group_field(corpus)
    lines = JsonRows(name, corpus.text_field, group_field, found=row > 0) if is_json_lines else None
    try:
        for table in tables.iter(BATCH_ROWS):
            if lines is None:
                texts, groups = _values(table, corpus.text_field, group_field, name, row)
            else:
                texts, groups = _of_lines(table, lines, row)
            row += table.num_rows
            here = {"rows": row, "stream": tables.state_dict()}
            yield Table(texts, groups, (0, here) if lines is None or lines.found else None)
        if lines:
            lines.require_field()
    except (CalmError, MemoryError):
        raise
    except Exception as error:  # of datasets, of Arrow, of the network
        remedy = "; corpus.source: files may read its files" if Path(corpus.dataset).is_dir() else ""
        raise CalmError(f"{name} cannot be read after row {row:,}: {one_line(error)}{remedy}") from None


def _group_field(corpus: CorpusParams) -> str | None:
    return None if corpus.split_unit == "document" else corpus.split_unit


def _values(table: Any, field: str, group_field: str | None, name: str, row: int) -> tuple[Texts, Groups]:
    _require_fields(field, group_field, table.column_names, name)
    values = table[field].to_pylist()
    for number, value in enumerate(values, row + 1):
        if not isinstance(value, str | None):
            kind = table.schema.field(field).type
            raise CalmError(f"{name}, row {number:,}: field {field!r} holds {kind}, not text; change corpus.text_field")
    if group_field is None:
        return list(values), None
    return list(values), groups_of(values, table[group_field].to_pylist(), name, group_field, row + 1)


def _require_fields(field: str, group_field: str | None, fields: list[str], name: str) -> None:
    if field not in fields:
        raise no_field(name, field, fields)
    if group_field is not None and group_field not in fields:
        raise no_field(name, group_field, fields, "split_by")


def _of_lines(table: Any, rows: JsonRows, row: int) -> tuple[Texts, Groups]:
    lines = enumerate(table["text"].to_pylist(), row + 1)
    return rows.columns(
        [
            rows.of_line(line.removeprefix("\ufeff"), number, ended=True)
            for number, line in lines
            if line and not line.isspace()
        ]
    )


def _open(corpus: CorpusParams) -> tuple[Any, bool]:
    """The stream, and whether its rows are lines of JSON that are still to be read."""
    split = corpus.dataset_split
    try:
        name = str(Path(corpus.dataset).expanduser())
        builder = datasets.load_dataset_builder(name, corpus.configuration or None)
        if isinstance(builder.config, JsonConfig) and builder.config.field is None:
            lines = _lines(builder).as_streaming_dataset(split=split)
            first = next(iter(lines), {"text": "{"})["text"].removeprefix("\ufeff").strip()
            # A file may also be one list, or objects over several lines, which `datasets` reads as a whole.
            if first.startswith("{") and (first.endswith("}") or len(first) == 1):
                return lines, True
        stream = builder.as_streaming_dataset(split=split)
        if isinstance(builder.config, ParquetConfig) and builder.info.features:
            group_field = _group_field(corpus)
            name = f"dataset {corpus.dataset!r}"
            _require_fields(corpus.text_field, group_field, list(builder.info.features), name)
            columns = list({corpus.text_field: None} | ({} if group_field is None else {group_field: None}))
            # So many rows at once, since a group of rows that is empty gives no number of its own.
            builder.config.columns, builder.config.batch_size = columns, BATCH_ROWS
            stream = builder.as_streaming_dataset(split=split)
        return stream, False
    except CalmError:
        raise
    except Exception as error:  # datasets raises many kinds, all of which say why
        # `datasets` has run no scripts since its version 4, whatever it is asked to trust.
        remedy = "; no code of a dataset is run: convert it to Parquet" if "script" in str(error) else ""
        raise CalmError(
            f"dataset {corpus.dataset!r} (split {split!r}) cannot be opened: {one_line(error)}{remedy}"
        ) from None


def _lines(builder: Any) -> Text:
    """The files of a dataset of JSON, by their lines."""
    return Text(
        dataset_name=builder.dataset_name,
        base_path=builder.base_path,
        token=builder.token,
        repo_id=builder.repo_id,
        data_files=builder.config.data_files,
        encoding=builder.config.encoding,
        chunksize=PIECE_BYTES,
        sample_by="line",
    )
