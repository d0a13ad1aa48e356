"""What readers of a corpus hand on: the texts of some rows, and where reading can go on after them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

PIECE_BYTES = 1 << 20
"""Of a text file, what is read at once."""

BATCH_ROWS = 64
"""Rows of JSON, of Parquet or of a dataset that are in memory together."""

Texts = list[str | None]
"""Of rows; None for one without text."""

Position = dict[str, Any]
"""A place inside a file or a stream; plain JSON."""

Rows = tuple[Texts, Position | None]
"""Some rows of a file, and the position after them; None: reading cannot begin there."""


class Table(NamedTuple):
    """Some rows of a corpus."""

    texts: Texts
    mark: tuple[int, Position | None] | None = None
    """Where reading can go on after them: the number of a file and the position in it. None: not there."""


def in_batches(texts: Iterable[str | None]) -> Iterator[Texts]:
    """``texts``, ``BATCH_ROWS`` at a time."""
    rest = iter(texts)
    while batch := list(itertools.islice(rest, BATCH_ROWS)):
        yield batch
