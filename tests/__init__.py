"""Tests, in folders that mirror the code's."""

import platform
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
"""The repository's root."""

needs_linux = pytest.mark.skipif(
    platform.system() != "Linux",
    reason="limits memory, mounts or pins as only Linux does (RLIMIT_AS, RLIMIT_DATA, /proc, tmpfs, taskset)",
)
"""A test of what the other systems have no means to try."""
