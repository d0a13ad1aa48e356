"""Where text comes from: botocore's documentation, local files, or any Hugging Face dataset.

Every source is streamed: only the longest document has to fit in memory. With each document goes the group that
decides its split (splits.py).

A stream can resume at any document: it seeks to the last mark before that document and skips the documents between,
without opening earlier files again. Only botocore's documentation is always read from its beginning, to find copies.
"""

import itertools
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import botocore

from calm_core.corpus.botocore_docs import LICENCE, botocore_documents
from calm_core.corpus.datasets_stream import dataset_tables
from calm_core.corpus.file_readers import file_tables
from calm_core.corpus.rows import Table, in_batches
from calm_core.errors import CalmError
from calm_core.params import CorpusParams

MARK_DOCUMENTS = 4096
"""Least number of documents between two marks."""


class Document(NamedTuple):
    """A text, and what decides its split: itself, its file, or the value of a field of its row."""

    text: str
    group: str


class Mark(NamedTuple):
    """A position to seek to: before document number ``documents``, within a file or a dataset."""

    documents: int = 0
    file: int = 0
    """Which file is being read."""
    position: dict[str, Any] | None = None
    """Where in it, or the state of a stream in `datasets`; plain JSON."""
    without_text: int = 0
    """Rows before it that are no documents, since they have no text."""


class Place(NamedTuple):
    """Where a stream resumes: before document number ``documents``, which is the mark's or a later one."""

    documents: int = 0
    mark: Mark = Mark()


class Documents:
    """The documents of a corpus in their order, empty ones left out, at most ``corpus.documents``, from ``start`` on.

    In the end a line on standard error says how many rows had no text.

    Iterating raises CalmError: a file is missing, of an unknown format, not UTF-8 or damaged; a dataset or a field
    cannot be found; a row has a text but no group; there is no text at all.
    """

    def __init__(self, corpus: CorpusParams, start: Place = Place()) -> None:  # noqa: B008 - a tuple of constants
        self._corpus, self._start = corpus, start
        # Reading runs ahead of encoding by some batches, so marks are kept until a place after them is asked for.
        self._marks = deque([start.mark])
        self._read, self._without_text = start.mark.documents, start.mark.without_text

    def __iter__(self) -> Iterator[Document]:
        if self._start.documents == self._corpus.documents:
            return
        for table in _tables(self._corpus, self._start.mark):
            groups = itertools.repeat(table.groups) if isinstance(table.groups, str | None) else table.groups
            # Not strict: one group is repeated for all.
            for text, group in zip(table.texts, groups, strict=False):
                if not text or text.isspace():
                    self._without_text += 1
                    continue
                self._read += 1
                if self._read > self._start.documents:
                    yield Document(text, text if group is None else group)
                if self._read == self._corpus.documents:
                    return self._tell()
            # Not at every table: a resumed stream may as well skip some documents.
            if table.mark and self._read >= self._marks[-1].documents + MARK_DOCUMENTS:
                self._marks.append(Mark(self._read, *table.mark, self._without_text))
        if self._read == 0:
            rows = f" in {self._without_text:,} rows" if self._without_text else ""
            raise CalmError(f"the corpus holds no text{rows}: {describe(self._corpus)['source']}")
        self._tell()

    def place(self, documents: int) -> Place:
        """Where to resume before document number ``documents``, which has been read; non-decreasing over calls.

        Documents are numbered from 0 at the beginning of the corpus, wherever this stream starts.
        """
        while len(self._marks) > 1 and self._marks[1].documents <= documents:
            self._marks.popleft()
        return Place(documents, self._marks[0])

    def _tell(self) -> None:
        if self._without_text:
            rows = self._read + self._without_text
            line = (
                f"corpus: {self._without_text:,} of {rows:,} rows have no text (null, absent or empty) and were skipped"
            )
            print(line, file=sys.stderr, flush=True)


def documents(corpus: CorpusParams) -> Iterator[str]:
    """Yield the texts of ``corpus``, as ``Documents`` does, from the first on."""
    return (document.text for document in Documents(corpus))


def describe(corpus: CorpusParams) -> dict[str, str]:
    """Name and licence of the corpus, for the description beside the tokens."""
    if corpus.source == "botocore":
        return {"source": f"botocore {botocore.__version__} API documentation", "licence": LICENCE}
    if corpus.source == "files":
        return {"source": "files: " + ", ".join(corpus.paths), "licence": "as stated by their owner"}
    name = " ".join(part for part in (corpus.dataset, corpus.configuration, corpus.dataset_split) if part)
    return {"source": f"dataset: {name}", "licence": "as stated on the dataset's card"}


def _tables(corpus: CorpusParams, mark: Mark) -> Iterator[Table]:
    if corpus.source == "botocore":
        if botocore.__version__ != corpus.botocore_version:
            raise CalmError(
                f"corpus.botocore_version is {corpus.botocore_version} but {botocore.__version__} is installed; "
                "install requirements.lock, or set it to the installed version"
            )
        return _botocore_tables(corpus)
    if corpus.source == "files":
        return file_tables(corpus, mark.file, mark.position)
    return dataset_tables(corpus, mark.position)


def _botocore_tables(corpus: CorpusParams) -> Iterator[Table]:
    by_service = corpus.split_unit == "service"
    for batch in in_batches(botocore_documents()):
        groups = [document["service"] for document in batch] if by_service else None
        yield Table([document["text"] for document in batch], groups)
