"""A copy of the user's tree, as DVC's queue and flows make them, reads the user's text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calm_core.params import load_params
from stages import digest_corpus, tokenise
from stages.runner.users_tree import users_tree
from tests.reliability.support.stage_processes import make_project

COPIES = (".dvc/tmp/exps/tmpx", ".dvc/tmp/exps/standalone/tmpx", ".dvc/tmp/flows/run-x/inside/a/bigger/repository")


@pytest.fixture(params=["tree", "a #2"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small project whose text git does not know."""
    return make_project(tmp_path / request.param)


@pytest.mark.parametrize("place", COPIES)
def test_a_copy_reads_the_text_of_the_tree(tree: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    params = yaml.safe_load((tree / "params.yaml").read_text())
    params["corpus"]["paths"] = ["text/*.txt"]
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    (tree / "text").mkdir()
    (tree / "corpus.txt").rename(tree / "text/a.txt")
    monkeypatch.chdir(tree)
    assert users_tree() == tree
    (tree / "data").mkdir()
    (tree / "data/params_checked.json").touch()
    digest_corpus.main(load_params())
    tokenise.main(load_params())

    copy = tree / place
    for name in ("params.yaml", "dvc.yaml", "stages", "calm_core", "data/params_checked.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).symlink_to(tree / name)
    (copy / "text").mkdir()
    (copy / "text/a.txt").write_text("what git knows of it")
    monkeypatch.chdir(copy)
    assert users_tree() == tree
    digest_corpus.main(load_params())
    tokenise.main(load_params())
    for made in ("data/corpus.json", "data/tokens/description.json"):
        assert (copy / made).read_bytes() == (tree / made).read_bytes()
    assert json.loads((copy / "data/corpus.json").read_text())["bytes"] == (tree / "text/a.txt").stat().st_size
    assert not (copy / ".checkpoints/corpus.json").exists()
    assert Path.cwd() == copy


def test_code_is_that_of_the_copy(tmp_path: Path) -> None:
    """An import inside the block, too."""
    tree, copy = tmp_path, tmp_path / COPIES[0]
    for folder in (tree, copy):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").touch()
        (folder / "late.py").write_text(f"print({str(folder)!r})")
    (copy / "stage.py").write_text(
        "from stages.runner.users_tree import in_users_tree\nwith in_users_tree():\n    import late\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "stage"]
    ended = subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True, text=True)
    assert ended.stdout == f"{copy}\n"
