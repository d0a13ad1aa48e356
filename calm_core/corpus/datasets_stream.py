"""A dataset of the Hugging Face hub, or a folder that `datasets` understands, as a stream of its texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.parquet.parquet import ParquetConfig

from calm_core.corpus.rows import BATCH_ROWS, Table
from calm_core.errors import CalmError, one_line
from calm_core.params import CorpusParams

# It would tell a server of each file of the user's that it opens, and wait for seconds where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def dataset_tables(corpus: CorpusParams, state: dict[str, Any] | None) -> Iterator[Table]:
    """The texts of the dataset that ``corpus`` names, from its ``state`` on, which was read before."""
    field, name, row = corpus.text_field, corpus.dataset, 0
    # Arrow tables of a few rows: one row at a time, datasets takes longer than the tokenizer does for a short text.
    tables = _open(corpus).with_format("arrow")
    if state is not None:
        row = state["rows"]
        tables.load_state_dict(state["stream"])
    try:
        for table in tables.iter(BATCH_ROWS):
            if field not in table.column_names:
                raise CalmError(
                    f"{name} has no field {field!r}; corpus.text_field can be: {', '.join(table.column_names)}"
                )
            texts = table[field].to_pylist()
            for number, value in enumerate(texts, row + 1):
                if not isinstance(value, str | None):
                    kind = table.schema.field(field).type
                    raise CalmError(
                        f"{name}, row {number}: field {field!r} holds {kind}, not text; change corpus.text_field"
                    )
            row += len(texts)
            yield Table(texts, (0, {"rows": row, "stream": tables.state_dict()}))
    except (CalmError, MemoryError):
        raise
    except Exception as error:  # of datasets, of Arrow, of the network
        raise CalmError(f"dataset {name!r} cannot be read after row {row}: {one_line(error)}") from None


def _open(corpus: CorpusParams) -> Any:
    split = corpus.dataset_split
    try:
        name = str(Path(corpus.dataset).expanduser())
        builder = datasets.load_dataset_builder(name, corpus.configuration or None)
        stream = builder.as_streaming_dataset(split=split)
        if isinstance(builder.config, ParquetConfig) and corpus.text_field in (builder.info.features or ()):
            # This column alone, and so many rows at once: others may differ from file to file, and a group of rows that
            # is empty gives no number of its own.
            builder.config.columns, builder.config.batch_size = [corpus.text_field], BATCH_ROWS
            stream = builder.as_streaming_dataset(split=split)
        return stream
    except Exception as error:  # datasets raises many kinds, all of which say why
        # `datasets` has run no scripts since its version 4, whatever it is asked to trust.
        remedy = "; no code of a dataset is run: convert it to Parquet" if "script" in str(error) else ""
        raise CalmError(
            f"dataset {corpus.dataset!r} (split {split!r}) cannot be opened: {one_line(error)}{remedy}"
        ) from None
