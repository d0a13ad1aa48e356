"""Threads of OpenMP sleep where they wait, in stages and in `calm`, unless the user has said how."""

import os
import subprocess
import sys

import pytest

from calm_core.runtime.waiting import VARIABLES
from tests import ROOT

# Modules that are imported before torch; `calm` begins in main.
BEGINNINGS = {"stages": "import stages", "calm": "from calm_core.cli import main; sys.argv = ['calm', 'preset']"}


@pytest.mark.parametrize(
    "chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "1"}]
)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_who_chooses(beginning: str, chosen: dict[str, str]) -> None:
    program = f"""
import atexit, os, sys
atexit.register(lambda: print({{name: os.environ[name] for name in {VARIABLES} if name in os.environ}}))
{BEGINNINGS[beginning]}
assert "torch" not in sys.modules
main() if "main" in globals() else None
"""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, env=environment | chosen, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == str(chosen or {"OMP_WAIT_POLICY": "PASSIVE"})
