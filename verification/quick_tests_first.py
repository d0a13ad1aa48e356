"""A pytest plugin for `make mutants`: the quickest test first, since the first failure ends a mutant.

mutmut names the tests that reach a mutant, in no order of worth, and keeps how long each took beside the mutants.
"""

import json
from pathlib import Path

import pytest

STATS = Path("mutmut-stats.json")
"""In the folder where mutmut runs the tests; it appears after the first run of all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort ``items`` by the seconds that they took."""
    if STATS.exists():
        seconds: dict[str, float] = json.loads(STATS.read_text(encoding="utf-8"))["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
