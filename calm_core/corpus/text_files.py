"""Text in local files (.txt, .jsonl, .parquet, also compressed) and in the tables of `datasets`, read as a stream.

Files of one format that follow each other are one dataset, so that a stream can be opened again at a mark inside it.
"""

import codecs
import glob
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets

from calm_core.corpus.compression import COMPRESSED, can_decompress, open_decompressed
from calm_core.corpus.json_guard import require_objects
from calm_core.errors import CalmError, one_line
from calm_core.params import CorpusParams

# It would tell a server of each file of the user's that it opens, and wait for seconds where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

PIECE_BYTES = 1 << 20
"""Of a text or JSON file, what `datasets` reads at once: a tenth of its own choice, which takes many times that in
memory and is no faster."""

BATCH_ROWS = 64
"""Rows of a dataset that are in memory together, apart from such a piece."""

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip

TableIsRead = Callable[[int, Callable[[], dict[str, Any]]], None]
"""Called with the number of the group of files and a way to ask for the state of its dataset."""


def source_files(corpus: CorpusParams) -> list[Path]:
    """The files on this machine that ``corpus`` is read from; none if it comes from elsewhere or is installed."""
    if corpus.source == "files":
        return [path for pattern in corpus.paths for path in _expand(pattern)]
    if corpus.source == "huggingface" and Path(corpus.dataset).is_dir():
        return _expand(corpus.dataset)
    return []


def file_texts(
    corpus: CorpusParams, first_group: int, state: dict[str, Any] | None, table_is_read: TableIsRead
) -> Iterator[str]:
    """The texts of ``source_files``, from group of files number ``first_group`` on, whose dataset is in ``state``."""
    for number, ((kind, _), group) in enumerate(groupby(source_files(corpus), key=_read_together)):
        files = [str(path) for path in group]
        if number < first_group:
            continue
        group_state = state if number == first_group else None
        options: dict[str, Any] = {"sample_by": corpus.text_unit} if kind == "text" else {}
        if kind != "parquet":
            options["chunksize"] = PIECE_BYTES
        field = "text" if kind == "text" else corpus.text_field
        try:
            for file in files if kind == "json" else ():
                require_objects(Path(file))
            opened = datasets.load_dataset(
                kind, data_files=[glob.escape(file) for file in files], split="train", streaming=True, **options
            )
            name = files[0] if len(files) == 1 else f"{files[0]} and others"
            yield from field_texts(opened, field, name, group_state, partial(table_is_read, number))
        except (CalmError, MemoryError):
            raise
        except Exception as error:
            for path in map(Path, files):
                _require_readable_text(path)
            raise CalmError(f"{', '.join(files)} cannot be read as {kind}: {one_line(error)}") from None


def field_texts(
    dataset: Any,
    field: str,
    name: str,
    state: dict[str, Any] | None,
    table_is_read: Callable[[Callable[[], dict[str, Any]]], None],
) -> Iterator[str]:
    """The values of ``field`` in a `datasets` stream called ``name``, from its ``state`` on, which was read before."""
    # Arrow tables of a few rows: one row at a time, datasets takes longer than the tokenizer does for a short text.
    tables = dataset.with_format("arrow")
    if state is not None:
        tables.load_state_dict(state)
    for table in tables.iter(BATCH_ROWS):
        if field not in table.column_names:
            raise CalmError(f"{name} has no field {field!r}; corpus.text_field can be: {', '.join(table.column_names)}")
        for value in table[field].to_pylist():
            if not isinstance(value, str):
                kind = type(value).__name__
                raise CalmError(f"{name}: field {field!r} holds {kind}, not text; change corpus.text_field")
            yield value
        table_is_read(tables.state_dict)


def _read_together(path: Path) -> tuple[str, Path | None]:
    """What two files that follow each other must share to be one dataset; each file of JSON is looked through alone."""
    kind = _format(path)
    return kind, path if kind == "json" else None


def _expand(pattern: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in alphabetical order."""
    try:
        if Path(pattern).is_file():
            found = [Path(pattern)]  # its name may look like a glob
        elif Path(pattern).is_dir():
            found = sorted(Path(pattern).rglob("*"))
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        # Folders that a glob finds have no text; a pipe or a device might never end.
        found = [path for path in found if path.is_file()]
    except OSError as error:
        raise CalmError(f"corpus.paths: {pattern}: {error.strerror}") from None
    if not found:
        raise CalmError(f"corpus.paths: {pattern} matches no file")
    return found


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if path.suffix in COMPRESSED and not can_decompress(path.suffix):
        raise CalmError(
            f"{path} needs the package backports.zstd: `pip install backports.zstd`, or compress it otherwise"
        )
    kind = _FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise CalmError(f"{path} is of an unknown format; known endings: {', '.join(_FORMATS)}, also compressed")
    return kind


def _require_readable_text(path: Path) -> None:
    """Raise CalmError at the first byte of ``path`` that is not UTF-8 text."""
    if ".parquet" in path.suffixes:
        return
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    pending = 0  # bytes of an unfinished character that the decoder holds
    try:
        with open_decompressed(path) as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
                position += len(chunk)
                pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = position - pending + error.start
        raise CalmError(f"{path} is not UTF-8 text (byte {at}); convert it, for instance with iconv") from None
    except MemoryError:
        raise
    except Exception as error:  # each decompressor has kinds of its own
        raise CalmError(f"{path} cannot be read: {one_line(error)}") from None
