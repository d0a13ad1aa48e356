"""Where text comes from: botocore's documentation, local files, or any Hugging Face dataset.

Every source is streamed, files and datasets by `datasets`: only the longest document has to fit in memory. A hash of
its text alone assigns a document to a split: it never moves between splits, whatever else is added, and copies of a
text stay in one split.

A stream can resume at any document: it seeks to the last mark before that document and skips the documents between,
without opening earlier files again. Only botocore's documentation is always read from its beginning, to find copies.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import botocore
import datasets

from calm_core.corpus.botocore_docs import LICENCE, botocore_documents
from calm_core.corpus.text_files import TableIsRead, field_texts, file_texts
from calm_core.errors import CalmError, one_line
from calm_core.params import CorpusParams

MARK_DOCUMENTS = 4096
"""Least number of documents between two marks."""


class Mark(NamedTuple):
    """A position to seek to: before document number ``documents``, within a group of files or a dataset."""

    documents: int = 0
    group: int = 0
    """Which group of files of one format is being read."""
    state: dict[str, Any] | None = None
    """The state of the stream in `datasets`; plain JSON."""


class Place(NamedTuple):
    """Where a stream resumes: before document number ``documents``, which is the mark's or a later one."""

    documents: int = 0
    mark: Mark = Mark()


class Documents:
    """The texts of a corpus in their order, empty ones left out, at most ``corpus.documents``, from ``start`` on.

    Iterating raises CalmError: a file is missing, of an unknown format, not UTF-8 or damaged; a dataset or a field
    cannot be found; there is no text at all.
    """

    def __init__(self, corpus: CorpusParams, start: Place = Place()) -> None:  # noqa: B008 - a tuple of constants
        self._corpus, self._start = corpus, start
        # Reading runs ahead of encoding by some batches, so marks are kept until a place after them is asked for.
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
        """Where to resume before document number ``documents``, which has been read; non-decreasing over calls.

        Documents are numbered from 0 at the beginning of the corpus, wherever this stream starts.
        """
        while len(self._marks) > 1 and self._marks[1].documents <= documents:
            self._marks.popleft()
        return Place(documents, self._marks[0])

    def _table_is_read(self, group: int, state: Callable[[], dict[str, Any]]) -> None:
        # Not at every table: a mark holds the state of a stream, and a resumed one may as well skip some documents.
        if self._read >= self._marks[-1].documents + MARK_DOCUMENTS:
            self._marks.append(Mark(self._read, group, state()))


def documents(corpus: CorpusParams) -> Iterator[str]:
    """Yield the texts of ``corpus``, as ``Documents`` does, from the first on."""
    return iter(Documents(corpus))


def describe(corpus: CorpusParams) -> dict[str, str]:
    """Name and licence of the corpus, for the description beside the tokens."""
    if corpus.source == "botocore":
        return {"source": f"botocore {botocore.__version__} API documentation", "licence": LICENCE}
    if corpus.source == "files":
        return {"source": "files: " + ", ".join(corpus.paths), "licence": "as stated by their owner"}
    name = " ".join(part for part in (corpus.dataset, corpus.configuration, corpus.dataset_split) if part)
    return {"source": f"dataset: {name}", "licence": "as stated on the dataset's card"}


def is_validation(text: str, validation_percent: float) -> bool:
    """Whether ``text`` is held out: its SHA-256, read as a fraction, falls below ``validation_percent``."""
    # surrogatepass: JSON may hold lone surrogates, which plain UTF-8 refuses.
    fraction = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return fraction < validation_percent / 100


def _texts(corpus: CorpusParams, mark: Mark, table_is_read: TableIsRead) -> Iterator[str]:
    if corpus.source == "botocore":
        if botocore.__version__ != corpus.botocore_version:
            raise CalmError(
                f"corpus.botocore_version is {corpus.botocore_version} but {botocore.__version__} is installed; "
                "install requirements.lock, or set it to the installed version"
            )
        yield from (document["text"] for document in botocore_documents())
    elif corpus.source == "files":
        yield from file_texts(corpus, mark.group, mark.state, table_is_read)
    else:
        opened = _open_dataset(corpus)
        yield from field_texts(opened, corpus.text_field, corpus.dataset, mark.state, partial(table_is_read, 0))


def _open_dataset(corpus: CorpusParams) -> Any:
    split = corpus.dataset_split
    try:
        return datasets.load_dataset(corpus.dataset, corpus.configuration or None, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds, all of which say why
        # `datasets` has run no scripts since its version 4, whatever it is asked to trust.
        remedy = "; no code of a dataset is run: convert it to Parquet" if "script" in str(error) else ""
        raise CalmError(
            f"dataset {corpus.dataset!r} (split {split!r}) cannot be opened: {one_line(error)}{remedy}"
        ) from None
