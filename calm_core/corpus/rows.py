"""What readers of a corpus hand on: the texts of some rows, their groups, and where reading can go on after them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

Value = TypeVar("Value")

PIECE_BYTES = 1 << 20
"""Of a text file, what is read at once."""

BATCH_ROWS = 64
"""Rows of JSON, of Parquet or of a dataset that are in memory together."""

Texts = list[str | None]
"""Of rows; None for one without text."""

Groups = Sequence[str | None] | str | None
"""Of rows, what decides their split: each one's (None for one without text), one for all, or None: each text itself."""

Position = dict[str, Any]
"""A place inside a file or a stream; plain JSON."""

Rows = tuple[Texts, Groups, Position | None]
"""Some rows of a file, and the position after them; None: reading cannot begin there."""


class Table(NamedTuple):
    """Some rows of a corpus."""

    texts: Texts
    groups: Groups = None
    mark: tuple[int, Position | None] | None = None
    """Where reading can go on after them: the number of a file and the position in it. None: not there."""


def in_batches(rows: Iterable[Value]) -> Iterator[list[Value]]:
    """``rows``, ``BATCH_ROWS`` at a time."""
    rest = iter(rows)
    while batch := list(itertools.islice(rest, BATCH_ROWS)):
        yield batch
