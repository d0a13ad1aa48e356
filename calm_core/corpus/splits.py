"""Which split a document goes to: a hash of its group, which is its text, its file, or a field's value of its row.

Groups never move between splits, whatever else the corpus has; a group is in one split as a whole. The held-out splits
take the two ends of the hashes, so that the size of one moves no document out of the other.
"""

import datetime
import decimal
import hashlib
import math
from typing import Any

from calm_core.corpus.faults import no_group

SPLITS = ("train", "validation", "test")
HELD_OUT = SPLITS[1:]
"""What no model is trained on: settings are chosen by validation, and what is reported is of test."""


def split_of(group: str, validation_percent: float, test_percent: float) -> str:
    """The split of the documents of ``group``: its number is read as a fraction.

    Validation has the fractions below ``validation_percent``, test the last ``test_percent``, training those between.
    """
    return split_of_number(group_number(group), validation_percent, test_percent)


def group_number(group: str) -> int:
    """The first 64 bits of the SHA-256 of ``group``: its split, and its name in data/groups.parquet."""
    # surrogatepass: JSON may hold lone surrogates, which plain UTF-8 refuses.
    return int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split_of_number(number: int, validation_percent: float, test_percent: float) -> str:
    """``split_of`` the group that has this ``group_number``."""
    fraction = number / 2**64
    if fraction < validation_percent / 100:
        return "validation"
    return "test" if fraction >= 1 - test_percent / 100 else "train"


def group_of(value: Any, name: str, field: str) -> str:
    """The group of the row called ``name``, whose ``field`` holds ``value``: the same for the same value in any format.

    Raises:
        CalmError: there is no value, or one that is neither text nor a number nor a date.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # A file of JSON may have 1.0 where one of Parquet has 1.
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    if isinstance(value, int | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    kinds = {type(None): "null", list: "a list", dict: "an object", bytes: "bytes"}
    raise no_group(name, field, kinds.get(type(value), f"a {type(value).__name__}"))
