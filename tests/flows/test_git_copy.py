"""Copies of a tree for runs beside it: down to the byte, whatever git is set to and wherever the tree lies."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_core.errors import CalmError
from flows.git import git
from flows.git_copy import bring_commit, copy_tree
from flows.workspaces import copy_with_overrides, require_experiment_name, revision, save_experiment
from tests.flows.conftest import run

HOSTILE = """
[diff]
    noprefix = true
    mnemonicPrefix = true
    external = false
    renames = copies
[color]
    ui = always
[core]
    quotepath = true
    autocrlf = true
    safecrlf = true
    abbrev = 5
    fsmonitor = /nonexistent
    hooksPath = {hooks}
    pager = false
[apply]
    whitespace = error
[commit]
    gpgsign = true
[tag]
    gpgsign = true
[push]
    gpgSign = true
[init]
    defaultBranch = "branch with-no/sense"
    templateDir = {hooks}
[status]
    short = true
    branch = true
    showUntrackedFiles = no
    relativePaths = false
[clone]
    defaultRemoteName = other
    rejectShallow = true
[submodule]
    recurse = true
[transfer]
    fsckObjects = true
[merge]
    ff = only
[rebase]
    autostash = true
[index]
    skipHash = true
[feature]
    manyFiles = true
[user]
    useConfigOnly = true
"""
"""Settings that people have, each of which changes what some command of git prints or does."""


@pytest.fixture()
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """git as somebody else has set it; every hook that it calls fails."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-checkout", "pre-commit", "commit-msg", "pre-push", "reference-transaction", "post-index-change"):
        (hooks / name).write_text("#!/bin/sh\necho a hook >&2\nexit 1\n")
        (hooks / name).chmod(0o755)
    settings = tmp_path / "gitconfig"
    settings.write_text(HOSTILE.format(hooks=hooks).replace('"branch with-no/sense"', "trunk"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    # As inside a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other/.git/index"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    return settings


def edit_everything(folder: Path) -> None:
    """A change of each kind that is not committed."""
    (folder / "params.yaml").write_text("toy:\n  start: 0 # kept\n  value: 2   \n  fail: ''\r\n")
    (folder / "step.py").chmod(0o755)
    (folder / "binary").write_bytes(bytes(range(256)) * 9)
    (folder / "with space ü\n.txt").write_text("a")
    (folder / "-dash").write_text("no option")
    (Path(os.fsdecode(os.fsencode(folder) + b"/latin1-\xe9"))).write_text("b")
    (folder / "link").symlink_to("step.py")
    (folder / "sub").mkdir()
    (folder / "sub/new.txt").write_text("new\r\n")
    run(folder, "git", "add", "--all")
    (folder / "sub/new.txt").write_text("changed after it was staged\r\n")
    run(folder, "git", "mv", "old.txt", "renamed.txt")
    run(folder, "git", "rm", "--quiet", "gone.txt")
    (folder / "gone-too.txt").unlink()
    (folder / "was-a-file").unlink()
    (folder / "was-a-file").mkdir()
    (folder / "was-a-file/inside").write_text("c")
    run(folder, "git", "add", "was-a-file/inside")
    (folder / "intended.txt").write_text("as DVC's documentation says")
    run(folder, "git", "add", "--intent-to-add", "intended.txt")
    (folder / "untracked.txt").write_text("not part of it")


@pytest.fixture()
def project(project: Path) -> Path:
    """The small project without stages: DVC saves an experiment of nothing that has to be made first."""
    (project / "dvc.yaml").write_text("stages: {}\n")
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "no stages")
    return project


@pytest.fixture()
def tree(project: Path) -> Path:
    """The small project with a few more files committed, then a change of each kind."""
    for name in ("old.txt", "gone.txt", "gone-too.txt", "was-a-file"):
        (project / name).write_text(f"{name}\n" * 20)
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "more")
    run(project, "git", "config", "core.autocrlf", "false")  # where others may have set it for all repositories
    edit_everything(project)
    return project


def contents(folder: Path) -> dict[str, tuple[bytes, int] | str]:
    """All files but those of git and DVC: bytes and permissions, or where a link leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else (path.read_bytes(), path.stat().st_mode)
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and not {".git", ".dvc"} & set(path.relative_to(folder).parts)
    }


def test_a_copy_is_the_tree_to_the_byte(tree: Path, tmp_path: Path, hostile: Path) -> None:
    expected = contents(tree)
    del expected["untracked.txt"]
    git(tree, "config", "--unset", "core.autocrlf")
    copy = tmp_path / "copy"
    copy.mkdir()
    assert copy_tree(tree, copy) == copy
    assert contents(copy) == expected
    assert git(copy, "rev-parse", "HEAD") == git(tree, "rev-parse", "HEAD")
    # What an experiment would commit: everything, and nothing of the tree's own index or objects has changed.
    assert git(copy, "diff-files", "-z") == b""
    listed = {os.fsdecode(name) for name in git(copy, "ls-files", "-z").split(b"\0") if name}
    assert {name for name in listed if not name.startswith(".dvc/")} == set(expected)


def test_an_experiment_arrives(tree: Path, hostile: Path) -> None:
    git(tree, "config", "--remove-section", "user")  # and there is none for all repositories
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file() and ".dvc" not in path.parts}
    with copy_with_overrides(tree, ["toy.value=7"]) as copy:
        assert "value: 7" in (copy / "params.yaml").read_text()
        (copy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        save_experiment(copy, tree, "seven")
    commit = git(tree, "rev-parse", "HEAD").decode().strip()
    saved = f"refs/exps/{commit[:2]}/{commit[2:]}/seven"
    assert b"value: 7" in git(tree, "show", f"{saved}:params.yaml")
    assert git(tree, "cat-file", "blob", f"{saved}:binary") == bytes(range(256)) * 9
    # What git itself would store of a file, its lines' ends included.
    for name in ("sub/new.txt", "step.py", "binary"):
        assert git(tree, "rev-parse", f"{saved}:{name}") == git(tree, "hash-object", name)
    assert git(tree, "cat-file", "blob", f"{saved}:sub/new.txt") == b"changed after it was staged\r\n"
    assert git(tree, "rev-parse", f"{saved}^").decode().strip() == commit
    assert git(tree, "log", "-1", "--format=%an", saved) == b"calm flows\n"
    assert not list((tree / ".dvc/tmp/flows").iterdir())
    # New objects and the reference are all that has changed.
    assert {path: path.read_bytes() for path in before} == before


def in_a_bigger_repository(project: Path, tmp_path: Path) -> Path:
    big = tmp_path / "big"
    shutil.copytree(project, big / "some where/project", ignore=shutil.ignore_patterns(".git"))
    (big / "outside.txt").write_text("of others")
    run(big, "git", "init", "--quiet")
    run(big, "git", "add", "--all")
    run(big, "git", "-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--message", "big")
    return big / "some where/project"


def a_worktree(project: Path, tmp_path: Path) -> Path:
    run(project, "git", "worktree", "add", "--quiet", str(tmp_path / "worktree"))
    return tmp_path / "worktree"


def a_detached_head(project: Path, tmp_path: Path) -> Path:
    run(project, "git", "checkout", "--quiet", "--detach")
    return project


def a_shallow_clone(project: Path, tmp_path: Path) -> Path:
    run(project, "git", "commit", "--quiet", "--allow-empty", "--message", "second")
    run(tmp_path, "git", "clone", "--quiet", "--depth", "1", project.as_uri(), "shallow")
    return tmp_path / "shallow"


def a_sparse_checkout(project: Path, tmp_path: Path) -> Path:
    (project / "left out").mkdir()
    (project / "left out/file").touch()
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "second")
    run(project, "git", "sparse-checkout", "set", ".dvc")
    assert not (project / "left out").exists()
    return project


def a_merge_in_progress(project: Path, tmp_path: Path) -> Path:
    for branch, value in (("one", "1\n"), ("two", "2\n")):
        run(project, "git", "checkout", "--quiet", "-b", branch)
        (project / "conflict.txt").write_text(value)
        run(project, "git", "add", "--all")
        run(project, "git", "commit", "--quiet", "--message", branch)
        run(project, "git", "checkout", "--quiet", "-")
    merged = subprocess.run(["git", "merge", "--quiet", "one"], cwd=project, capture_output=True)
    merged = subprocess.run(["git", "merge", "--quiet", "two"], cwd=project, capture_output=True)
    assert merged.returncode == 1
    return project


def odd_name(name: str) -> Callable[[Path, Path], Path]:
    def move(project: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(project, tmp_path / name))

    move.__name__ = name
    return move


@pytest.mark.parametrize(
    "place",
    [
        in_a_bigger_repository,
        a_worktree,
        a_detached_head,
        a_shallow_clone,
        a_sparse_checkout,
        a_merge_in_progress,
        *map(
            odd_name, ("a #2", "a 'b\" c", "100% $HOME ${x}", "ünï 🙂", "a:b", "a [1]*", "# a", "a;b,c", " a ", "a\tb")
        ),
    ],
)
def test_wherever_it_lies(project: Path, tmp_path: Path, place: Callable[[Path, Path], Path]) -> None:
    folder = place(project, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with copy_with_overrides(folder, ["toy.value=7"]) as copy:
        expected = contents(folder)
        found = contents(copy)
        assert found.pop("params.yaml") != expected.pop("params.yaml")
        assert found == expected
        assert git(copy, "log", "--format=%H") == git(folder, "log", "--format=%H")
        cache = run(copy, "dvc", "cache", "dir").strip()
        assert cache == str(folder / ".dvc/cache")
        (copy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        save_experiment(copy, folder, "seven")
    # Nothing that is not there is deleted by it, or of the repository around it.
    (saved,) = git(folder, "for-each-ref", "--format=%(objectname)", "refs/exps").decode().split()
    changed = git(folder, "diff-tree", "-r", "--name-only", "--relative", "-z", "HEAD", saved).split(b"\0")
    assert {b"params.yaml", b"dvc.lock"} <= {*changed} <= {b"params.yaml", b"dvc.lock", b"conflict.txt", b""}
    assert not git(folder, "diff-tree", "-r", "--diff-filter=D", "HEAD", saved)
    # DVC, which shall list it, finds its settings, too.
    assert "seven" in run(folder, "dvc", "exp", "list", "--name-only")
    made = [path for path in tmp_path.rglob("*") if path not in before]
    assert [path for path in made if not {".git", ".dvc"} & set(path.relative_to(tmp_path).parts)] == []


def test_params_that_are_a_link_stay_as_they_are(project: Path, tmp_path: Path) -> None:
    elsewhere = (project / "params.yaml").rename(tmp_path / "my params.yaml")
    before = elsewhere.read_bytes()
    (project / "params.yaml").symlink_to(elsewhere)
    run(project, "git", "add", "--all")
    with copy_with_overrides(project, ["toy.value=7"]) as copy:
        assert "value: 7" in (copy / "params.yaml").read_text()
    assert elsewhere.read_bytes() == before


def test_what_git_does_not_track_has_settings_too(project: Path) -> None:
    """Local settings of DVC's, with paths that are relative to the file that they stand in."""
    (project / ".dvc/config.local").write_text("[cache]\n    dir = ../my cache\n    type = symlink\n")
    with copy_with_overrides(project, []) as copy:
        assert run(copy, "dvc", "cache", "dir").strip() == str(project / "my cache")
        assert run(copy, "dvc", "config", "cache.type").strip() == "symlink"


@pytest.mark.parametrize("name", ["a/b", "a b", "a..b", "", "a.lock", "a~1"])
def test_names_that_no_experiment_can_have(tmp_path: Path, name: str) -> None:
    require_experiment_name(tmp_path, "some-name_7.5")
    with pytest.raises(CalmError, match="cannot be the name of an experiment; use letters"):
        require_experiment_name(tmp_path, name)


def test_without_a_commit(tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet")
    assert revision(tmp_path) == "no-commit"
    with (
        pytest.raises(CalmError, match=r"has no commit yet.*`git add --all && git commit --message start`"),
        copy_with_overrides(tmp_path, []),
    ):
        pass


def test_gits_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision(tmp_path) == "no-commit"
    with pytest.raises(CalmError, match=r"^`git rev-parse` failed in .*: fatal: not a git repository [^\n]*$"):
        git(tmp_path, "rev-parse", "HEAD")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another")
def test_a_tree_of_another_owner(project: Path) -> None:
    for path in (project, project / ".git"):
        os.chown(path, 4711, 4711)
    with (
        pytest.raises(CalmError, match=r"dubious ownership.* git config --global --add safe.directory [^\n]*$"),
        copy_with_overrides(project, []),
    ):
        pass


def test_a_commit_is_brought_with_its_past(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tree(project, copy)
    base = git(copy, "rev-parse", "HEAD").decode().strip()
    for name in ("one", "two"):
        (copy / name).write_text(name)
        run(copy, "git", "add", name)
        run(copy, "git", "commit", "--quiet", "--message", name)
    commit = git(copy, "rev-parse", "HEAD").decode().strip()
    bring_commit(commit, base, copy, project)
    shutil.rmtree(copy)
    assert git(project, "show", f"{commit}:one") == b"one"
    assert git(project, "fsck", "--strict", commit) == b""
