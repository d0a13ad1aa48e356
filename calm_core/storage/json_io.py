"""JSON files: written atomically, read with an error that names the file."""

import json
import math
from pathlib import Path
from typing import Any

from calm_core.errors import CalmError
from calm_core.storage.atomic import write_text

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file, at most: far more than any of this project's."""

AGAIN = "delete it and run `dvc repro`"
"""What to do about a damaged file that a stage made."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str | None = None) -> Any:
    """The value that ``path`` holds; raises CalmError where it is missing or damaged.

    The message ends in ``remedy``; without one, a stage makes the file. NaN and numbers beyond a float's range are no
    JSON, though Python reads and writes them.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CalmError(f"{path} has more than {LARGEST_JSON:,} bytes; {remedy or AGAIN}")
        # Both hooks: Python's parser takes NaN as a constant, and 1e999 as a float that is infinite.
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise CalmError(f"{path} is missing; {remedy or '`dvc repro` makes it'}") from None
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CalmError(f"{path} is damaged; {remedy or AGAIN}") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number
