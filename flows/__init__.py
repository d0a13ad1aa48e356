"""Prefect flows over the pipeline: they run stages through DVC, and import neither torch nor the models."""

import os
import sys
from pathlib import Path

from calm_core.runtime.caches import is_writable

# A flow without a server starts one for itself, and on a busy machine that takes longer than the 20 seconds that
# Prefect waits for it.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")

# Prefect keeps a database in the home, and reads its settings when it is imported: before that.
_home = os.environ.get("PREFECT_HOME") or "~/.prefect"
if not is_writable(_home):
    # Ignored by git and DVC.
    os.environ["PREFECT_HOME"] = str(Path(__file__).resolve().parents[1] / ".dvc/tmp/prefect")
    print(f"Prefect cannot write in {_home}; it keeps its database in {os.environ['PREFECT_HOME']}", file=sys.stderr)
