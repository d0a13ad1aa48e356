"""Where a flow run works: the user's own tree, one run at a time, or a copy of it for a variation.

A run without overrides works in the tree itself. A run with overrides gets a copy under .dvc/tmp with the same
DVC cache, so that params.yaml of the tree is never touched, not even by a run that is killed; it ends as a DVC
experiment of the tree, which `dvc exp show` lists and `dvc exp apply` brings back.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from calm_core.errors import CalmError
from calm_core.storage.lock import acquire
from flows.git import git
from flows.git_copy import bring_commit, commit_files, copy_tree

POLL_SECONDS = 1.0
WRITTEN = ("params.yaml", "dvc.lock")
"""Files of a copy that git tracks and a run writes."""


class WorkspaceBusyError(Exception):
    """Another flow run works in the tree, and this one was asked not to wait."""


@contextmanager
def exclusive(folder: Path, wait: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder`` for one flow run; the lock goes with the process, however it ends.

    Raises:
        WorkspaceBusyError: another run holds it and ``wait`` is false.
    """
    place = folder / ".dvc/tmp/flows.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        held = acquire(place)
    except Timeout:
        if not wait:
            raise WorkspaceBusyError(
                f"another flow run works in {folder}; wait for it, cancel it, or run with wait_for_others: true"
            ) from None
        say(f"waiting for another flow run in {folder}")
        held = acquire(place, POLL_SECONDS)
    except OSError as error:
        raise CalmError(f"cannot lock {place}: {error.strerror}; make it writable, or move the project") from None
    with held:
        yield


@contextmanager
def copy_with_overrides(folder: Path, overrides: list[str]) -> Iterator[Path]:
    """A copy of ``folder``, its uncommitted changes included, with ``overrides`` applied to params.yaml.

    What the cache holds of the outputs is checked out in it. The copy is removed afterwards.

    Raises:
        CalmError: ``folder`` is in no git repository, in one without a commit, or in one that git refuses to read.
        ValueError: an override is no KEY=VALUE, or names no key of params.yaml.
    """
    parent = folder / ".dvc/tmp/flows"
    parent.mkdir(parents=True, exist_ok=True)
    # Under .dvc/tmp, which git and DVC ignore, and where stages know relative paths to be those of ``folder``.
    copy = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    try:
        project = copy_tree(folder, copy)
        _share_cache(folder, project)
        for name in WRITTEN:
            _own_content(project / name)
        apply_overrides(project / "params.yaml", overrides)
        yield project
    finally:
        shutil.rmtree(copy, ignore_errors=True)


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


def require_experiment_name(folder: Path, name: str) -> None:
    """Raise CalmError if ``name`` cannot be an experiment's, before hours of work end without one."""
    try:
        git(folder, "check-ref-format", f"refs/exps/{name}")
        possible = "/" not in name
    except CalmError:
        possible = False
    if not possible:
        raise CalmError(f"{name!r} cannot be the name of an experiment; use letters, digits, dashes and underscores")


def save_experiment(copy: Path, folder: Path, name: str) -> None:
    """Record what ``copy`` holds as the DVC experiment ``name`` of ``folder``; it replaces one of that name.

    What stages made is in the cache already, and dvc.lock names it: `dvc exp save` would look through all of it again.

    Raises:
        CalmError: git cannot store it.
    """
    base = git(copy, "rev-parse", "--verify", "HEAD").decode().strip()
    # DVC keeps experiments as commits that git references by this name.
    reference = f"refs/exps/{base[:2]}/{base[2:]}/{name}"
    commit = commit_files(copy, f"dvc: commit experiment {name}", [b"dvc.lock"])
    bring_commit(commit, base, copy, folder)
    git(folder, "update-ref", reference, commit)


def revision(folder: Path) -> str:
    """The commit that ``folder`` stands on, short, with "+" where tracked files differ from it."""
    try:
        commit = git(folder, "rev-parse", "--short", "--verify", "HEAD").decode().strip()
        changed = git(folder, "status", "--porcelain", "-z", "--untracked-files=no", "--", ".")
    except CalmError:  # no repository, no commit, or one that git does not read: nothing that a run needs
        return "no-commit"
    return commit + ("+" if changed else "")


def params_digest(folder: Path, overrides: list[str]) -> str:
    """Eight hexadecimal digits that stand for params.yaml and ``overrides``."""
    content = (folder / "params.yaml").read_bytes() + json.dumps(overrides).encode()
    return hashlib.sha256(content).hexdigest()[:8]


def _own_content(path: Path) -> None:
    """Make a link to a file the file itself: what is written into it shall not reach where it leads."""
    if path.is_symlink() and path.is_file():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)


def _share_cache(folder: Path, project: Path) -> None:
    """Settings of ``folder`` that are not in git, for ``project``, and the same cache: nothing is computed twice."""
    from configobj import ConfigObj
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        # Paths in it are absolute now, whatever they were relative to.
        own, cache = repo.config.read("local"), repo.cache.local_cache_dir
    # As DVC writes them, which knows what a path may not hold as it is; but DVC writes ASCII alone.
    settings = ConfigObj(encoding="utf-8")
    for section, values in own.items():
        if section in ("db", "machine", "remote"):
            settings |= {f'{section} "{name}"': dict(named) for name, named in values.items()}
        else:
            settings[section] = dict(values)
    settings.setdefault("cache", {})["dir"] = cache
    (project / ".dvc").mkdir(exist_ok=True)
    with (project / ".dvc/config.local").open("wb") as file:
        settings.write(file)
