"""Run the smoke pipeline in two clean clones and compare dvc.lock; status 1 and what differs if it is not the same."""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from calm_core.storage.yaml_io import read_yaml
from verification.comparison import differences
from verification.smoke_run import LOCK, output_of, smoke_run

NOT_COMPARED = ("timings.json", "timings.js")
"""Wall-clock times: no result, see stages/running.py."""


def main() -> int:
    """Clone the last commit twice, run both, compare; the clones are removed if they agree."""
    if changed := output_of(Path.cwd(), "git", "status", "--porcelain", "--untracked-files=no"):
        print(f"uncommitted changes in {len(changed.splitlines())} files are not verified", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    runs = [folder / name for name in ("first", "second")]
    for run in runs:
        started = time.monotonic()
        smoke_run(run)
        print(f"{run.name} run: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    found = compare(*runs)
    if found:
        print("\n".join([f"{len(found)} artefacts differ; both runs are kept in {folder}", *found]))
        return 1
    outputs = sum(len(stage.get("outs", [])) for stage in _stages(runs[0]).values())
    print(f"{LOCK} is the same, byte for byte: {outputs} outputs of {len(_stages(runs[0]))} stages")
    shutil.rmtree(folder)
    return 0


def compare(first: Path, second: Path) -> list[str]:
    """A line for each artefact in which two finished runs differ; none if their dvc.lock are the same."""
    if (first / LOCK).read_bytes() == (second / LOCK).read_bytes():
        return []
    found = [
        f"{part}/{line}"
        for part in ("data", "models", "results")
        for line in differences(first / part, second / part)
        if not line.startswith(NOT_COMPARED)
    ]
    return found or [f"{LOCK} alone: {line}" for line in differences(first, second) if line.startswith(LOCK)]


def _stages(folder: Path) -> dict[str, dict[str, list[object]]]:
    found: dict[str, dict[str, list[object]]] = read_yaml(folder / LOCK)["stages"]
    return found


if __name__ == "__main__":
    sys.exit(main())
