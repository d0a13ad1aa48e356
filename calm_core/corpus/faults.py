"""Errors of reading a file, of whatever library, in one line with its name and a remedy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from calm_core.errors import CalmError, one_line


def no_field(name: str, field: str, fields: Iterable[str], key: str = "text_field") -> CalmError:
    """The error where what is called ``name`` has ``fields``, but not the ``field`` that corpus.``key`` names."""
    possible = ["document", *fields] if key == "split_by" else fields
    return CalmError(f"{name} has no field {field!r}; corpus.{key} can be: {', '.join(possible)}")


def no_group(name: str, field: str, kind: str) -> CalmError:
    """The error where the ``field`` that corpus.split_by names holds ``kind`` in the row called ``name``."""
    return CalmError(
        f"{name}: field {field!r}, which corpus.split_by names, holds {kind}; every row needs text or a number "
        "there, or set corpus.split_by to document"
    )


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Any error of reading ``path`` becomes a CalmError with its name."""
    try:
        yield
    except (CalmError, MemoryError):
        raise
    except Exception as error:  # each decompressor has kinds of its own
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        remedy = "cut short or damaged? fetch or make it again"
        if "too much memory" in why:  # of zstd, which has no other word for it
            remedy = "it was packed with a long window; unpack it: zstd -d --long=31"
        raise CalmError(f"{path} cannot be read: {why}; {remedy}") from None
