"""Where a flow run works: the user's own tree, one run at a time, or a clone of it for a variation.

A run without overrides works in the tree itself. A run with overrides gets a clone under .dvc/tmp with the same
DVC cache, so that params.yaml of the tree is never touched, not even by a run that is killed; it ends as a DVC
experiment of the tree, which `dvc exp show` lists and `dvc exp apply` brings back.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from calm_core.storage.lock import acquire

POLL_SECONDS = 1.0
IDENTITY = {"user.name": "calm flows", "user.email": "flows@localhost"}
"""The author of experiments' commits where git has none configured."""

DVC = (sys.executable, "-m", "dvc")


class WorkspaceBusyError(Exception):
    """Another flow run works in the tree, and this one was asked not to wait."""


@contextmanager
def exclusive(folder: Path, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder`` for one flow run; the lock goes with the process, however it ends.

    Raises:
        WorkspaceBusyError: another run holds it and ``wait`` is false.
    """
    place = folder / ".dvc/tmp/flows.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = acquire(place)
    except Timeout:
        if not wait:
            raise WorkspaceBusyError(
                f"another flow run works in {folder}; wait for it, cancel it, or run with wait_for_others: true"
            ) from None
        say(f"waiting for another flow run in {folder}")
        held = acquire(place, POLL_SECONDS)
    with held:
        yield


@contextmanager
def clone_with_overrides(folder: Path, overrides: list[str]) -> Iterator[Path]:
    """A clone of ``folder``, its uncommitted changes included, with ``overrides`` applied to params.yaml.

    What the cache holds of the outputs is checked out in it. The clone is removed afterwards.

    Raises:
        ValueError: an override is no KEY=VALUE, or names no key of params.yaml.
    """
    parent = folder / ".dvc/tmp/flows"
    parent.mkdir(parents=True, exist_ok=True)
    # Under .dvc/tmp, which git and DVC ignore.
    clone = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    try:
        _git(parent, "clone", "--quiet", "--shared", str(folder), str(clone))
        for key, value in IDENTITY.items():  # an experiment is a commit, and someone's
            _git(clone, "config", key, _setting(folder, key) or value)
        # A clone has commits alone; what the user has changed and not committed is what should run.
        changes = _git(folder, "diff", "HEAD", "--binary")
        if changes.strip():
            _git(clone, "apply", "--whitespace=nowarn", "-", given=changes)
        # The same cache: nothing is computed or stored twice.
        (clone / ".dvc/config.local").write_text(f"[cache]\n    dir = {_cache(folder)}\n", encoding="utf-8")
        apply_overrides(clone / "params.yaml", overrides)
        yield clone
    finally:
        shutil.rmtree(clone, ignore_errors=True)


def apply_overrides(params: Path, overrides: list[str]) -> None:
    """Write ``overrides``, KEY=VALUE as for `dvc exp run -S`, into ``params``.

    Raises:
        ValueError: an override is no KEY=VALUE, or names no key of ``params``.
    """
    from dvc.utils.hydra import apply_overrides as apply

    from calm_core.storage.yaml_io import read_yaml

    values = read_yaml(params)
    for override in overrides:
        key, equals, _ = override.partition("=")
        at = values
        for part in key.strip().split("."):
            if not equals or not isinstance(at, dict) or part not in at:
                raise ValueError(f"override {override!r} sets no key of params.yaml; write section.key=value")
            at = at[part]
    apply(params, overrides)


def save_experiment(clone: Path, folder: Path, name: str) -> None:
    """Record what ``clone`` holds as the DVC experiment ``name`` of ``folder``.

    Raises:
        RuntimeError: DVC cannot save it; the message has DVC's output.
    """
    command = [*DVC, "exp", "save", "--force", "--name", name]
    saved = subprocess.run(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if saved.returncode:
        raise RuntimeError(f"the experiment {name} was not saved: {saved.stdout.strip()}")
    # DVC keeps experiments as git references, which a push moves like branches.
    for line in _git(clone, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines():
        if line.endswith(f"/{name}"):
            _git(clone, "push", "--quiet", "--force", str(folder), f"{line}:{line}")


def revision(folder: Path) -> str:
    """The commit that ``folder`` stands on, short, with "+" where tracked files differ from it."""
    commit = _git(folder, "rev-parse", "--short", "HEAD").strip()
    return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no").strip() else "")


def params_digest(folder: Path, overrides: list[str]) -> str:
    """Eight hexadecimal digits that stand for params.yaml and ``overrides``."""
    content = (folder / "params.yaml").read_bytes() + json.dumps(overrides).encode()
    return hashlib.sha256(content).hexdigest()[:8]


def _cache(folder: Path) -> Path:
    found = subprocess.run([*DVC, "cache", "dir"], cwd=folder, check=True, capture_output=True, text=True)
    return (folder / found.stdout.strip()).resolve()


def _setting(folder: Path, key: str) -> str:
    found = subprocess.run(["git", "config", key], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip()


def _git(folder: Path, *arguments: str, given: str | None = None) -> str:
    found = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, input=given)
    return found.stdout
