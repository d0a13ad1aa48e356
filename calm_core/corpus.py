"""Where text comes from: botocore's documentation, local files, or any Hugging Face dataset.

Whatever the source, it is read as a stream, files and datasets by `datasets`: a corpus need not fit in
memory, only its longest document. A document belongs to the validation split by a hash of its text alone: it
never moves between splits, whatever else is added, and a text that occurs twice stays on one side.

A stream goes on from any document: files before it are not opened again, and the text between a mark shortly before
it and itself is read but not yielded. Only botocore's documentation is read from its beginning, to know copies.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import botocore
import datasets

from calm_core.botocore_corpus import LICENCE, botocore_documents
from calm_core.errors import CalmError, one_line
from calm_core.json_files import require_objects
from calm_core.params import Corpus

# It would tell a server of each file of the user's that it opens, and wait for seconds where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

PIECE_BYTES = 1 << 20
"""Of a text or JSON file, what `datasets` reads at once: a tenth of its own choice, which takes many times that in
memory and is no faster."""

BATCH_ROWS = 64
"""Rows of a dataset that are in memory together, apart from such a piece."""

MARK_DOCUMENTS = 4096
"""How many documents lie at least between two places that a stream can be opened at."""

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]


class Mark(NamedTuple):
    """A place that a stream can be opened at: before document number ``documents``, with a file or dataset in hand."""

    documents: int = 0
    group: int = 0
    """Which group of files of one format is being read."""
    state: dict[str, Any] | None = None
    """What `datasets` needs to go on in it; plain JSON."""


class Place(NamedTuple):
    """Where a stream goes on: before document number ``documents``, which is the mark's or a later one."""

    documents: int = 0
    mark: Mark = Mark()


class Documents:
    """The texts of a corpus in their order, empty ones left out, at most ``corpus.documents``, from ``start`` on.

    Iterating raises CalmError: a file is missing, of an unknown format, not UTF-8 or damaged; a dataset or a field
    cannot be found; there is no text at all.
    """

    def __init__(self, corpus: Corpus, start: Place = Place()) -> None:  # noqa: B008 - a tuple of constants
        self._corpus, self._start = corpus, start
        self._marks = deque([start.mark])
        self._read = start.mark.documents

    def __iter__(self) -> Iterator[str]:
        if self._start.documents == self._corpus.documents:
            return
        for text in _texts(self._corpus, self._start.mark, self._table_is_read):
            if not text or text.isspace():
                continue
            self._read += 1
            if self._read > self._start.documents:
                yield text
            if self._read == self._corpus.documents:
                return
        if self._read == 0:
            raise CalmError(f"the corpus holds no text: {describe(self._corpus)['source']}")

    def place(self, documents: int) -> Place:
        """Where to go on before document number ``documents``, which is read already; later calls ask for later ones.

        Documents are numbered from 0 at the beginning of the corpus, wherever this stream starts.
        """
        while len(self._marks) > 1 and self._marks[1].documents <= documents:
            self._marks.popleft()
        return Place(documents, self._marks[0])

    def _table_is_read(self, group: int, state: Callable[[], dict[str, Any]]) -> None:
        if self._read >= self._marks[-1].documents + MARK_DOCUMENTS:
            self._marks.append(Mark(self._read, group, state()))


def documents(corpus: Corpus) -> Iterator[str]:
    """Yield the texts of ``corpus``, as ``Documents`` does, from the first on."""
    return iter(Documents(corpus))


def describe(corpus: Corpus) -> dict[str, str]:
    """Name and licence of the corpus, for the description beside the tokens."""
    if corpus.source == "botocore":
        return {"source": f"botocore {botocore.__version__} API documentation", "licence": LICENCE}
    if corpus.source == "files":
        return {"source": "files: " + ", ".join(corpus.paths), "licence": "as stated by their owner"}
    name = " ".join(part for part in (corpus.dataset, corpus.configuration, corpus.dataset_split) if part)
    return {"source": f"dataset: {name}", "licence": "as stated on the dataset's card"}


def is_validation(text: str, validation_percent: float) -> bool:
    """Whether ``text`` is held out: its SHA-256, read as a fraction, falls below ``validation_percent``."""
    fraction = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return fraction < validation_percent / 100


_TableIsRead = Callable[[int, Callable[[], dict[str, Any]]], None]
"""Called with the number of the group of files and a way to ask for the state of its dataset."""


def source_files(corpus: Corpus) -> list[Path]:
    """The files on this machine that ``corpus`` is read from; none if it comes from elsewhere or is installed."""
    if corpus.source == "files":
        return [path for pattern in corpus.paths for path in _expand(pattern)]
    if corpus.source == "huggingface" and Path(corpus.dataset).is_dir():
        return _expand(corpus.dataset)
    return []


def _texts(corpus: Corpus, mark: Mark, table_is_read: _TableIsRead) -> Iterator[str]:
    if corpus.source == "botocore":
        if botocore.__version__ != corpus.botocore_version:
            raise CalmError(
                f"corpus.botocore_version is {corpus.botocore_version} but {botocore.__version__} is installed; "
                "install requirements.lock, or set it to the installed version"
            )
        yield from (document["text"] for document in botocore_documents())
    elif corpus.source == "files":
        yield from _file_texts(corpus, mark, table_is_read)
    else:
        opened = _open_dataset(corpus)
        yield from _field(opened, corpus.text_field, corpus.dataset, mark.state, partial(table_is_read, 0))


def _open_dataset(corpus: Corpus) -> Any:
    split = corpus.dataset_split
    try:
        return datasets.load_dataset(corpus.dataset, corpus.configuration or None, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds, all of which say why
        # `datasets` has run no scripts since its version 4, whatever it is asked to trust.
        remedy = "; no code of a dataset is run: convert it to Parquet" if "script" in str(error) else ""
        raise CalmError(
            f"dataset {corpus.dataset!r} (split {split!r}) cannot be opened: {one_line(error)}{remedy}"
        ) from None


def _file_texts(corpus: Corpus, mark: Mark, table_is_read: _TableIsRead) -> Iterator[str]:
    for number, ((kind, _), group) in enumerate(groupby(source_files(corpus), key=_read_together)):
        files = [str(path) for path in group]
        if number < mark.group:
            continue
        state = mark.state if number == mark.group else None
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
            yield from _field(opened, field, name, state, partial(table_is_read, number))
        except (CalmError, MemoryError):
            raise
        except Exception as error:
            for path in map(Path, files):
                _require_readable_text(path)
            raise CalmError(f"{', '.join(files)} cannot be read as {kind}: {one_line(error)}") from None


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
    suffixes = [suffix for suffix in path.suffixes if suffix not in (*_OPENERS, ".zst")]
    if path.suffix == ".zst" and find_spec("zstandard") is None:
        raise CalmError(f"{path} needs the package zstandard: `pip install zstandard`, or compress it otherwise")
    kind = _FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise CalmError(f"{path} is of an unknown format; known endings: {', '.join(_FORMATS)}, also compressed")
    return kind


def _field(
    dataset: Any,
    field: str,
    name: str,
    state: dict[str, Any] | None,
    table_is_read: Callable[[Callable[[], dict[str, Any]]], None],
) -> Iterator[str]:
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


def _require_readable_text(path: Path) -> None:
    """Raise CalmError at the first byte of ``path`` that is not UTF-8 text."""
    if ".parquet" in path.suffixes or path.suffix == ".zst":
        return
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    pending = 0  # bytes of an unfinished character that the decoder holds
    try:
        with _OPENERS.get(path.suffix, lambda p: p.open("rb"))(path) as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
                position += len(chunk)
                pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = position - pending + error.start
        raise CalmError(f"{path} is not UTF-8 text (byte {at}); convert it, for instance with iconv") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CalmError(f"{path} cannot be read: {one_line(error)}") from None
