"""Tests, in folders that mirror the code's."""

import platform
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
"""The repository's root."""

needs_linux = pytest.mark.skipif(
    platform.system() != "Linux",
    reason="needs what Linux alone has: limits of memory, a disk of any size, names of any bytes, taskset, namespaces",
)
"""A test of what the other systems have no means to try."""
