"""Run the smoke pipeline in two clean clones and compare dvc.lock; status 1 and what differs if it is not the same."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from calm_core.comparison import differences

LOCK = "dvc.lock"
NOT_COMPARED = ("timings.json", "timings.js")
"""Wall-clock times: no result, see stages/running.py."""


def main() -> int:
    """Clone the last commit twice, run both, compare; the clones are removed if they agree."""
    if changed := _output(Path.cwd(), "git", "status", "--porcelain", "--untracked-files=no"):
        print(f"uncommitted changes in {len(changed.splitlines())} files are not verified", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    runs = [folder / name for name in ("first", "second")]
    for run in runs:
        started = time.monotonic()
        _run(run)
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


def _run(folder: Path) -> None:
    _output(Path.cwd(), "git", "clone", "--quiet", "--no-hardlinks", str(Path.cwd()), str(folder))
    (folder / LOCK).unlink(missing_ok=True)
    _output(folder, sys.executable, "-m", "calm_core.command_line", "preset", "smoke")
    log = folder / "repro.log"
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            ["dvc", "repro", "--no-run-cache"],
            cwd=folder,
            env=_environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()[-5:]
        sys.exit("\n".join([f"the run in {folder} failed; the end of {log}:", *lines]))


def _environment(folder: Path) -> dict[str, str]:
    """The clone's own code goes before an installed one."""
    return {**os.environ, "PYTHONPATH": str(folder)}


def _output(folder: Path, *command: str) -> str:
    ended = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}: {ended.stderr.strip()}")
    return ended.stdout


def _stages(folder: Path) -> dict[str, dict[str, list[object]]]:
    found: dict[str, dict[str, list[object]]] = yaml.safe_load((folder / LOCK).read_text(encoding="utf-8"))["stages"]
    return found


if __name__ == "__main__":
    sys.exit(main())
