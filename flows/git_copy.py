"""A git repository like the user's, for a run beside it: the same commit, the same files down to the byte.

Nothing but plumbing, since what `git clone`, `diff` and `apply` do depends on settings, hooks and attributes, and since
the user's tree may stand anywhere inside a repository, in a worktree of one, on a branch or none. Objects are shared.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from calm_core.errors import CalmError
from flows.git import git, lines_of_zeros, setting, zeros

IDENTITY = {"user.name": "calm flows", "user.email": "flows@localhost"}
"""The author of experiments' commits where git has none configured."""

CONVERSIONS = ("core.autocrlf", "core.eol")
"""The user's settings that say how lines of the tree end in a commit; one may stand in their repository alone."""

SUBMODULE = b"160000"


def copy_tree(folder: Path, copy: Path) -> Path:
    """Make the empty folder ``copy`` a repository that stands on the same commit as ``folder``, with its tracked files.

    They are as they lie in ``folder``, whether committed, staged or neither. Files that git does not track are left
    out. Returns where in ``copy`` the project lies: it may be a folder inside its repository.

    Raises:
        CalmError: ``folder`` is in no repository, in one without a commit, or in one that git refuses to read.
    """
    inside = git(folder, "rev-parse", "--show-prefix").removesuffix(b"\n")
    try:
        commit = git(folder, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
    except CalmError:
        raise CalmError(
            f"{folder} has no commit yet, and a run with overrides becomes an experiment upon one: "
            "`git add --all && git commit --message start`"
        ) from None
    tracked = _tracked(folder)
    if b"params.yaml" not in tracked:
        raise CalmError(f"{folder}/params.yaml is not tracked by git, which a run with overrides copies: `git add` it")
    _init(folder, copy)
    git(copy, "update-ref", "HEAD", commit)
    git(copy, "read-tree", commit)
    project = copy / os.fsdecode(inside)
    project.mkdir(parents=True, exist_ok=True)
    for name in map(os.fsdecode, tracked):
        source, target = folder / name, project / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    # New ones too: what the index does not know, DVC leaves out of an experiment.
    # What a sparse checkout leaves out, and what lies outside the project, stays in the index as it was committed.
    absent = _tracked(folder, sparse=True)
    named = (tracked | _tracked(project)) - absent
    git(project, "update-index", "--add", "--remove", "--replace", "-z", "--stdin", given=zeros(sorted(named)))
    git(project, "update-index", "--skip-worktree", "-z", "--stdin", given=zeros(sorted(absent)))
    return project


def commit_files(project: Path, message: str, added: Iterable[bytes]) -> str:
    """Commit, upon HEAD but to no branch, all files of a copy that it tracks as they are now, and those ``added``."""
    names = {*lines_of_zeros(git(project, "ls-files", "-z")), *added}
    command = ("update-index", "--ignore-skip-worktree-entries", "--add", "--remove", "-z", "--stdin")
    git(project, *command, given=zeros(sorted(names)))
    tree = git(project, "write-tree").decode().strip()
    return git(project, "commit-tree", tree, "-p", "HEAD", "-m", message).decode().strip()


def bring_commit(commit: str, base: str, copy: Path, folder: Path) -> None:
    """Store ``commit`` of ``copy`` in the repository of ``folder``, which has ``base`` and all before it."""
    pack = git(copy, "pack-objects", "--revs", "--stdout", "-q", given=f"{commit}\n^{base}\n".encode())
    git(folder, "unpack-objects", "-q", given=pack)


def _tracked(folder: Path, sparse: bool = False) -> set[bytes]:
    """Names of all files that git tracks in ``folder``, staged ones and those in conflict included.

    ``sparse`` ones alone are those that a sparse checkout leaves out of the tree.
    """
    entries = (entry.split(b"\t", 1) for entry in lines_of_zeros(git(folder, "ls-files", "-t", "--stage", "-z")))
    kinds = ((name, *about.split(b" ", 2)[:2]) for about, name in entries)
    return {name for name, tag, mode in kinds if mode != SUBMODULE and (tag == b"S" or not sparse)}


def _init(folder: Path, copy: Path) -> None:
    kind = git(folder, "rev-parse", "--show-object-format").decode().strip()
    # Versions before 2.29 know neither another kind nor the option.
    git(copy, "init", "--quiet", "--template=", *([f"--object-format={kind}"] if kind == "sha256" else []))
    objects, shallow = (
        folder / os.fsdecode(git(folder, "rev-parse", "--git-path", name).removesuffix(b"\n"))
        for name in ("objects", "shallow")
    )
    if "\n" in str(objects):
        raise CalmError(f"git and DVC cannot share what lies in {folder}: its path has a line break; move it")
    (copy / ".git/objects/info").mkdir(parents=True, exist_ok=True)
    (copy / ".git/objects/info/alternates").write_bytes(os.fsencode(objects.absolute()) + b"\n")
    if shallow.is_file():
        shutil.copyfile(shallow, copy / ".git/shallow")
    settings = {key: setting(folder, key) for key in (*IDENTITY, *CONVERSIONS)}
    for key, value in {**settings, "core.safecrlf": "false"}.items():
        if value or key in IDENTITY:
            git(copy, "config", key, value or IDENTITY[key])
