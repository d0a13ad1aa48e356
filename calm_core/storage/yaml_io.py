"""YAML files, read as DVC reads them: by YAML 1.2, in which 1e-05 is a number.

DVC writes small numbers that way, and stages have to see the value that DVC compares. YAML 1.1, as other readers have
it, takes 1e-05 for text, 010 for 8, `off` for false and 1:30 for 90, and lets a key stand twice. Pure Python, since the
library's reader in C, which need not be installed, has other rules and messages.
"""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from calm_core.errors import CalmError, one_line

LARGEST_FILE, LARGEST_DEPTH = 1 << 18, 20
"""Bytes of a file, and levels in it, at most."""

# A tag that does not go with its value ends in any of the others: `!!int x`, `!!bool x`, `2001-99-99`.
_ERRORS = (YAMLError, ValueError, LookupError, AttributeError, TypeError)


def read_yaml(path: Path) -> Any:
    """The plain values that the YAML file at ``path`` holds: no object of Python's is ever made.

    Raises:
        CalmError: the file is missing or cannot be read, is not YAML, or is built to exhaust the machine.
    """
    text = _read(path)
    try:
        _require_small(text)
        return YAML(typ="safe", pure=True).load(text)
    except _ERRORS as error:
        raise _invalid(path, error) from None


def read_yaml_for_update(path: Path) -> Any:
    """The same values with comments, order and quotes, which ``yaml_text`` writes again."""
    text = _read(path)
    try:
        return _round_trip().load(text)
    except _ERRORS as error:
        raise _invalid(path, error) from None


def yaml_text(values: Any) -> str:
    """``values``, plain ones or those of ``read_yaml_for_update``, as ``read_yaml`` reads them back."""
    text = io.StringIO()
    _round_trip().dump(values, text)
    return text.getvalue()


def _round_trip() -> YAML:
    yaml = YAML()
    # Lines that the user wrote are not folded.
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            # One byte more than allowed is enough to recognise a file that is too long.
            content = file.read(LARGEST_FILE + 1)
        text = content.decode()
    except FileNotFoundError:
        raise CalmError(f"{path} is missing; run from the repository's root, or restore it with git") from None
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalmError(f"{path}, line {line} is not UTF-8 text; save the file as UTF-8") from None
    if len(content) > LARGEST_FILE:
        raise CalmError(f"{path} has more than {LARGEST_FILE:,} bytes; see the committed one for its layout")
    return text


def _invalid(path: Path, error: Exception) -> CalmError:
    place, problem = str(path), one_line(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        place = f"{path}, line {error.problem_mark.line + 1}"
        # Without what the library quotes of the file, and its advice on itself.
        problem = " ".join(part for part in (error.context, error.problem) if part)
    return CalmError(f"{place} is not valid YAML: {problem}")


def _require_small(text: str) -> None:
    """Raise YAMLError if ``text`` nests deeply, or refers back to a mapping or a list.

    Some lines of such references stand for more values than fit into memory.
    """
    depth, collections = 0, set()
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            depth += 1
            collections.add(event.anchor)
            if depth > LARGEST_DEPTH:
                raise YAMLError(f"more than {LARGEST_DEPTH} levels are nested")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        elif isinstance(event, AliasEvent) and event.anchor in collections:
            raise YAMLError(f"*{event.anchor} refers to a mapping or a list; write it out")
