"""git by its plumbing, whose output no setting changes, in bytes; where git refuses, its own words are the error."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from calm_core.errors import CalmError

# What `git rev-parse --local-env-vars` names: set inside a hook for instance, it goes before the folder asked about.
# Settings given as variables stay: one may be what makes a folder of another owner's a safe one.
ANOTHER_REPOSITORY = tuple(
    f"GIT_{name}"
    for name in (
        *("ALTERNATE_OBJECT_DIRECTORIES", "COMMON_DIR", "CONFIG", "DIR", "GRAFT_FILE", "IMPLICIT_WORK_TREE"),
        *("INDEX_FILE", "INTERNAL_SUPER_PREFIX", "NAMESPACE", "NO_REPLACE_OBJECTS", "OBJECT_DIRECTORY", "PREFIX"),
        *("QUARANTINE_PATH", "REPLACE_REF_BASE", "SHALLOW_FILE", "WORK_TREE"),
    )
)

# No hook of the user's runs on a copy, no watcher of files answers for one, and no index is written on the way.
OURS = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "--no-optional-locks")


def environment() -> dict[str, str]:
    """The variables of this process without those that point git to another repository."""
    return {name: value for name, value in os.environ.items() if name not in ANOTHER_REPOSITORY}


def git(folder: Path, *arguments: str | bytes, given: bytes | None = None) -> bytes:
    """What `git ARGUMENTS` prints in ``folder``, ``given`` on its standard input.

    Raises:
        CalmError: git is not installed, or fails; with what it says.
    """
    try:
        ended = subprocess.run([*OURS, *arguments], cwd=folder, env=environment(), capture_output=True, input=given)
    except FileNotFoundError:
        raise CalmError(f"git is not installed, or {folder} is missing") from None
    if ended.returncode:
        told = ended.stderr.decode(errors="replace").strip() or f"status {ended.returncode}"
        raise CalmError(f"`git {os.fsdecode(arguments[0])}` failed in {folder}: {told}")
    return ended.stdout


def setting(folder: Path, key: str) -> str:
    """What ``key`` is set to; empty if it is not."""
    try:
        return git(folder, "config", "--get", key).decode(errors="surrogateescape").rstrip("\n")
    except CalmError:
        return ""


def lines_of_zeros(output: bytes) -> list[bytes]:
    """The entries of a list that git has ended with a zero byte each, as by `-z`: names may hold any other byte."""
    return [entry for entry in output.split(b"\0") if entry]


def zeros(entries: Iterable[bytes]) -> bytes:
    """Such a list, to give to git."""
    return b"".join(entry + b"\0" for entry in entries)
