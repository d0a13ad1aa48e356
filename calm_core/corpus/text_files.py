"""Which files on this machine a corpus is read from: what `corpus.paths` stands for, and what is left out of it.

A path to a file is taken as it is. Of a folder and of what a glob finds, those files are left out that downloads,
Spark, DVC or git put beside the data (`_SUCCESS`, `.gitkeep`, README.md, LICENSE), those of other formats, and archives
beside what was unpacked of them; what is left out and what is read is told. Nothing here opens a file of text.
"""

import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from calm_core.errors import CalmError, single_line
from calm_core.params import CorpusParams

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of files that are decompressed."""

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip

_REMEDIES = {
    (".csv", ".tsv"): "make it Parquet, for instance with polars: read_csv(...).write_parquet(...)",
    (".arrow",): "make it Parquet: datasets.load_from_disk(...).to_parquet(...)",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it",
    (".html", ".htm", ".xml", ".pdf", ".epub", ".doc", ".docx", ".rtf"): "convert it to text",
}

_ABOUT = re.compile(r"readme([-_.].*)?|(licen[cs]e|copying)([-.].*)?")
_ABOUT_DATASETS = {"dataset_info.json", "dataset_infos.json", "state.json"}

_TOLD = 3
"""Names that are told of many."""


class _Found(NamedTuple):
    files: list[Path]
    left_out: list[Path]
    names: list[str]
    """Of ``files``, from the folder or the fixed part of the glob that found them."""


def source_files(corpus: CorpusParams) -> list[Path]:
    """The files on this machine that ``corpus`` is read from, each once; none if it comes from elsewhere.

    Raises:
        CalmError: a path matches no file, or names one of an unknown format.
    """
    return _found(corpus).files


def file_names(corpus: CorpusParams) -> list[str]:
    """A name for each of ``source_files``: its path from the folder or the beginning of the glob that names it.

    The same wherever that folder stands, and whatever other files there are.
    """
    return _found(corpus).names


def told_source_files(corpus: CorpusParams) -> list[Path]:
    """``source_files``, after a line on standard error that says how many, how large, and what was left out.

    Raises:
        CalmError: also where one of them may not be read.
    """
    found = _found(corpus)
    for path in found.files:
        if not os.access(path, os.R_OK):
            raise CalmError(f"{path} cannot be read: permission denied; give yourself the right, or leave it out")
    size = sum(path.stat().st_size for path in found.files)
    many = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    line = f"corpus: {many}, {_bytes(size)}: {_names(found.files)}"
    if found.left_out:
        line += f"; left out: {_names(found.left_out)}"
    print(single_line(line), file=sys.stderr, flush=True)
    return found.files


def file_format(path: Path) -> str | None:
    """How ``path`` is read, by its name: "text", "json" or "parquet"; None if that is not known."""
    return FORMATS.get(_endings(path)[0])


def _endings(path: Path) -> tuple[str, str]:
    """The ending of the format and that of the compression, each "" if there is none; in small letters."""
    # By strings, since there may be a hundred thousand of them.
    stem, ending = os.path.splitext(path.name.lower())  # noqa: PTH122
    return (os.path.splitext(stem)[1], ending) if ending in COMPRESSED else (ending, "")  # noqa: PTH122


def _found(corpus: CorpusParams) -> _Found:
    if corpus.source == "huggingface" and Path(corpus.dataset).expanduser().is_dir():
        # What `datasets` makes of them is its own affair, the card in README.md included.
        folder = Path(corpus.dataset).expanduser()
        files = [path for path in _walk(folder) if path.is_file()]
        return _Found(files, [], _names_from(folder, files))
    found_files: dict[str, tuple[Path, str]] = {}
    left_out: dict[str, Path] = {}
    folders: dict[Path, str] = {}
    for pattern in corpus.paths if corpus.source == "files" else ():
        found = _expand(pattern)
        # By what a path leads to: two patterns, or links of a download's cache, may name one file twice.
        for path, name in zip(found.files, found.names, strict=True):
            found_files.setdefault(_real(path, folders), (path, name))
        left_out.update((_real(path, folders), path) for path in found.left_out)
    return _Found(
        [path for path, _ in found_files.values()],
        [path for real, path in left_out.items() if real not in found_files],
        [name for _, name in found_files.values()],
    )


def _names_from(folder: Path, paths: list[Path]) -> list[str]:
    """``paths`` from ``folder`` on, with / on every system."""
    return [path.relative_to(folder).as_posix() for path in paths]


def _real(path: Path, folders: dict[Path, str]) -> str:
    """``os.path.realpath``, which takes a call of the system for each step of a path: once for each folder."""
    if path.is_symlink():
        return os.path.realpath(path)
    if (folder := folders.get(path.parent)) is None:
        folder = folders[path.parent] = os.path.realpath(path.parent)
    return f"{folder}/{path.name}"


def _expand(pattern: str) -> _Found:
    """The files that a path, a folder or a glob stands for, in alphabetical order."""
    if not pattern.strip():
        raise CalmError("corpus.paths holds an empty path; name a file, a folder or a glob")
    try:
        # A name is taken as it is where it exists: it may look like a glob, or begin with "~".
        here = pattern if Path(pattern).exists() else os.path.expandvars(Path(pattern).expanduser())
        if Path(here).is_file():
            if file_format(Path(here)) is None:
                raise CalmError(f"{here} is of an unknown format; {_remedy(Path(here))}")
            return _Found([Path(here)], [], [Path(here).name])
        if Path(here).is_dir():
            folder, found = Path(here), list(_walk(Path(here)))
        else:
            folder, found = _fixed_part(here), [path for path in _glob(here) if not path.is_dir()]
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of such a user
        place = getattr(error, "filename", None) or pattern
        raise CalmError(f"corpus.paths: {place}: {getattr(error, 'strerror', None) or error}") from None
    # A pipe or a device might never end, and a link may lead nowhere.
    files = [path for path in found if path.is_file() and file_format(path)]
    files = [path for path in files if path.name.lower() not in _ABOUT_DATASETS]
    files = [path for path in files if not _is_about(path)] or files
    names = set(map(str, files))
    files = [path for path in files if not (packed := _endings(path)[1]) or str(path)[: -len(packed)] not in names]
    left_out = sorted(set(found) - set(files))
    if not files:
        raise CalmError(f"corpus.paths: {pattern} matches no file{_why_none(left_out, here)}")
    return _Found(files, left_out, _names_from(folder, files))


def _fixed_part(pattern: str) -> Path:
    """The folder that a glob begins with."""
    parts = Path(pattern).parts
    return Path(*parts[: _fixed_parts(parts)])


def _fixed_parts(parts: tuple[str, ...]) -> int:
    return next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))


def _glob(pattern: str) -> Iterator[Path]:
    """What ``pattern`` matches but for markers, unless it asks for names that begin as theirs do."""
    parts = Path(pattern).parts
    fixed = _fixed_parts(parts)
    asked = any(part.startswith("_") for part in parts[fixed:])
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if asked or not any(part.startswith("_") for part in path.parts[fixed:]):
            yield path


def _walk(folder: Path, seen: set[str] | None = None) -> Iterator[Path]:
    """All in ``folder`` and its folders that is no folder, but for markers and hidden ones; links are followed."""
    seen = set() if seen is None else seen
    if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
        return
    seen.add(real)
    entries = sorted(folder.iterdir())
    if {"blobs", "snapshots"} <= {path.name for path in entries}:
        entries = [_snapshots(folder)]
    for path in entries:
        if path.is_dir():
            if not path.name.startswith((".", "_")):
                yield from _walk(path, seen)
        elif not _is_marker(path.name):
            yield path


def _snapshots(folder: Path) -> Path:
    """In a folder of the Hugging Face hub's cache: the files of the version that was fetched last, or of all."""
    main = folder / "refs" / "main"
    newest = folder / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else folder
    return newest if newest != folder and newest.is_dir() else folder / "snapshots"


def _why_none(left_out: list[Path], path: str) -> str:
    unknown = sorted((path for path in left_out if path.is_file()), key=lambda path: file_format(path) is not None)
    if unknown:
        return f" of a known format; there are: {_names(unknown)}; {_remedy(unknown[0])}"
    if left_out:
        return f": {_names(left_out)} is a pipe, a device, or a link that leads nowhere"
    return "; is the variable set?" if "$" in path else ""


def _is_marker(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_about(path: Path) -> bool:
    """Whether the name of ``path`` is that of a text about others."""
    ending, packed = _endings(path)
    stem = path.name.lower().removesuffix(packed).removesuffix(ending)
    return FORMATS.get(ending) == "text" and _ABOUT.fullmatch(stem) is not None


def _remedy(path: Path) -> str:
    name = path.name.lower()
    known = f"known endings: {', '.join(FORMATS)}, also with {', '.join(COMPRESSED)}"
    remedies = [remedy for endings, remedy in _REMEDIES.items() if name.endswith(endings)]
    return "; ".join([known, *remedies])


def _names(paths: list[Path]) -> str:
    more = len(paths) - _TOLD
    return ", ".join(map(str, paths[:_TOLD])) + (f" and {more:,} more" if more > 0 else "")


def _bytes(size: int) -> str:
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} bytes"
