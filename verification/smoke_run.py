"""A finished run of the smoke pipeline in a clean clone of the last commit."""

import subprocess
import sys
from pathlib import Path

from flows.git import OURS
from flows.git import environment as git_environment

LOCK = "dvc.lock"


def smoke_run(folder: Path) -> None:
    """Clone the last commit of the working folder into ``folder`` and run its pipeline with the preset smoke.

    Ends the process with the last lines of ``folder``/repro.log if that fails.
    """
    clone = (*OURS, "clone", "--quiet", "--no-hardlinks", "--template=")
    output_of(Path.cwd(), *clone, str(Path.cwd()), str(folder))
    (folder / LOCK).unlink(missing_ok=True)
    output_of(folder, sys.executable, "-m", "calm_core.cli", "preset", "smoke")
    log = folder / "repro.log"
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            ["dvc", "repro", "--no-run-cache"],
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()[-5:]
        sys.exit("\n".join([f"the run in {folder} failed; the end of {log}:", *lines]))


def environment(folder: Path) -> dict[str, str]:
    """Of a command in the clone ``folder``, whose own code goes before an installed one."""
    return {**git_environment(), "PYTHONPATH": str(folder)}


def output_of(folder: Path, *command: str) -> str:
    """What ``command`` prints in ``folder``; ends the process with what it complains of if it fails."""
    ended = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}: {ended.stderr.strip()}")
    return ended.stdout
