"""What the text is now, in a few bytes: the same for the same text on any machine, another as soon as it changes.

Files are hashed by their content, and again only if their size or one of their times is another than when they were
hashed last. A record keeps these; without it all are hashed.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calm_core.corpus.text_files import file_names, source_files
from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.runtime.processors import available_processors
from calm_core.storage.checksum import sha256

SETTLED_NANOSECONDS = 2 * 10**9
"""Since when a file must have been left alone for its times to tell of the next change: file systems keep them in
steps, the coarsest of two seconds."""


RECORD = "corpus.json"
"""The file of sizes, times and hashes."""


def corpus_digest(params: Params, folder: Path) -> dict[str, Any]:
    """What stands for the text and the tokenizer that ``params`` name, as plain JSON; the record is kept in ``folder``.

    Files are told by their number, their bytes, and the SHA-256 of what `sha256sum --zero` prints of them, in the order
    in which they are read, by their names from the innermost folder that holds them all; where the split goes by file,
    also by the names that decide it. What comes from elsewhere, pinned by params.yaml, is told by its name.

    Raises:
        CalmError: a file is missing or cannot be read.
    """
    corpus = params.corpus
    told: dict[str, Any] = {"source": corpus.source}
    files = source_files(corpus)
    if corpus.source == "huggingface" and not files:
        told["dataset"] = corpus.dataset
    tokenizer = []
    if params.tokenizer.path:
        from calm_core.tokens.tokenizer import tokenizer_file

        tokenizer = [tokenizer_file(Path(params.tokenizer.path))]
    sizes, digests = _hashed(files + tokenizer, folder / RECORD)
    if files:
        # One folder on every machine, whatever lies above it.
        above = os.path.commonpath([_placed(path.parent) for path in files])
        names = [os.fsencode(os.path.relpath(_placed(path), above)) for path in files]
        listing = b"".join(f"{digest}  ".encode() + name + b"\0" for digest, name in zip(digests, names, strict=False))
        told |= {
            "files": len(files),
            "bytes": sum(sizes[: len(files)]),
            "sha256": hashlib.sha256(listing).hexdigest(),
        }
    if corpus.split_unit == "file":
        # These begin elsewhere than the names above: at the folder that corpus.paths names.
        groups = b"".join(os.fsencode(name) + b"\0" for name in file_names(corpus))
        told["names_sha256"] = hashlib.sha256(groups).hexdigest()
    return told | {"tokenizer_sha256": digests[-1] if tokenizer else None}


def file_digests(files: Sequence[Path], folder: Path) -> list[str]:
    """SHA-256 of each of ``files`` in hexadecimal; record and errors as of ``corpus_digest``."""
    return _hashed(files, folder / RECORD)[1]


def _hashed(paths: Sequence[Path], record: Path) -> tuple[list[int], list[str]]:
    """Size and SHA-256 of each of ``paths``, read only where ``record`` does not know it as it is now."""
    known, now = _read_record(record), time.time_ns()
    # Other corpora's stay: the points of a sweep may have one each, and runs may alternate.
    seen = dict(known)
    stats = [_stat(path) for path in paths]
    # The time of change, which no program can set, tells of a text that was replaced by another of its size and time.
    marks = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
    names = [_placed(path) for path in paths]
    as_before = [name in known and known[name][:-1] == mark for name, mark in zip(names, marks, strict=True)]
    changed = [path for path, same in zip(paths, as_before, strict=True) if not same]
    fresh = iter(_hash_all(changed))
    digests = [str(known[name][-1]) if same else next(fresh) for name, same in zip(names, as_before, strict=True)]
    for name, mark, digest in zip(names, marks, digests, strict=True):
        # One that has just changed may change again without another time.
        if mark[2] < now - SETTLED_NANOSECONDS:
            seen[name] = [*mark, digest]
    if seen != known:
        _write_record(record, seen)
    return [stat.st_size for stat in stats], digests


def _hash_all(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each of ``paths``."""
    if not paths:
        return []
    # Here: a run without changes does not wait for it.
    from calm_core.runtime.progress import progress

    # Hashing leaves Python's lock alone. A disk gives no more to more threads than some.
    with (
        ThreadPoolExecutor(min(4, available_processors())) as pool,
        progress("hashing what params.yaml names", len(paths), "files") as advance,
    ):
        digests = []
        for digest in pool.map(_sha256, paths):
            digests.append(digest)
            advance()
    return digests


def _read_record(record: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return {name: list(entry) for name, entry in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # it saves time and nothing else
        return {}


def _write_record(record: Path, known: dict[str, list[Any]]) -> None:
    # Under a name of its own: copies of a tree, which share the record, may run at the same time.
    fresh = record.with_name(f".{record.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            record.parent.mkdir(exist_ok=True)
            fresh.write_text(json.dumps(known), encoding="utf-8")
            fresh.replace(record)
        finally:
            fresh.unlink(missing_ok=True)


def _placed(path: Path) -> str:
    """``path`` from the root, links left as they are."""
    return os.path.normpath(path.absolute())


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None
