"""The digest of the text, against coreutils and against what was changed in the files."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from calm_core.corpus import digest
from calm_core.corpus.digest import corpus_digest
from calm_core.errors import CalmError
from calm_core.params import Params

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
"""SHA-256 of "hello", as published."""


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a user's tree with two files of text."""
    folder = tmp_path / "tree"
    (folder / "text").mkdir(parents=True)
    (folder / "text/a.txt").write_text("one two")
    (folder / "text/b.txt").write_text("three")
    (folder / "params.yaml").touch()
    monkeypatch.chdir(folder)
    return folder


def of(params: Params, *paths: str, tokenizer: str = "") -> dict[str, Any]:
    corpus = params.corpus.model_copy(update={"source": "files", "paths": list(paths)})
    section = params.tokenizer.model_copy(update={"path": tokenizer})
    return corpus_digest(params.model_copy(update={"corpus": corpus, "tokenizer": section}), Path(".checkpoints"))


def test_it_is_what_sha256sum_prints(tree: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SETTLED_NANOSECONDS", -(10**9))
    names = ["a.txt", "b.txt", "with\nline.txt", "ü.txt", os.fsdecode(b"\xe9.txt")]
    for name in names[2:]:
        (tree / "text" / name).touch()
    found = of(params, "text/*.txt")
    assert of(params, "text/*.txt") == found  # from the record
    listed = subprocess.run(["sha256sum", "--zero", *names], cwd="text", check=True, capture_output=True)
    whole = subprocess.run(["sha256sum"], input=listed.stdout, check=True, capture_output=True)
    assert found == {
        "source": "files",
        "files": 5,
        "bytes": 12,
        "sha256": whole.stdout.decode().split()[0],
        "tokenizer_sha256": None,
    }


def a_line_more(text: Path) -> None:
    (text / "a.txt").open("a").write("\nthree")


def a_new_file(text: Path) -> None:
    (text / "c.txt").write_text("four")


def an_empty_file(text: Path) -> None:
    (text / "c.txt").touch()


def a_file_less(text: Path) -> None:
    (text / "b.txt").unlink()


def another_name(text: Path) -> None:
    (text / "b.txt").rename(text / "c.txt")


def swapped(text: Path) -> None:
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (text / f"{old}.txt").rename(text / f"{new}.txt")


def of_the_same_size_and_time(text: Path) -> None:
    """As `rsync --times` or `cp --preserve` leave it."""
    before = (text / "a.txt").stat()
    while (text / "a.txt").stat().st_ctime_ns == before.st_ctime_ns:  # a file system's clock has its steps
        (text / "a.txt").write_text("two one")
        os.utime(text / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [a_line_more, a_new_file, an_empty_file, a_file_less, another_name, swapped, of_the_same_size_and_time],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_other_text_has_another_digest(
    tree: Path, params: Params, change: Callable[[Path], None], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recorded:
        monkeypatch.setattr(digest, "SETTLED_NANOSECONDS", -(10**9))
    before = of(params, "text/*.txt")
    change(tree / "text")
    assert of(params, "text/*.txt") != before


def test_the_same_text_has_the_same_anywhere(tree: Path, tmp_path: Path, params: Params) -> None:
    before = of(params, "text/*.txt")
    os.utime("text/a.txt", ns=(0, 0))
    assert of(params, "text/*.txt") == before
    elsewhere = tmp_path / "another/place"
    shutil.copytree(tree / "text", elsewhere)
    assert of(params, f"{elsewhere}/*.txt") == before
    assert of(params, f"{elsewhere}/a.txt", "text/b.txt")["sha256"] != before["sha256"]  # no folder holds both alone


def test_files_that_are_as_before_are_not_read(tree: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = digest.sha256
    monkeypatch.setattr(digest, "sha256", lambda path: read.append(path) or whole(path))
    of(params, "text/*.txt")
    # Both have just been written: another change would leave the coarse times of some file systems as they are.
    assert not (tree / ".checkpoints/corpus.json").exists()
    monkeypatch.setattr(digest, "SETTLED_NANOSECONDS", -(10**9))
    read.clear()
    before = of(params, "text/*.txt")
    assert read == [Path("text/a.txt"), Path("text/b.txt")]
    read.clear()
    assert of(params, "text/*.txt") == before
    assert read == []
    a_line_more(tree / "text")
    of(params, "text/*.txt")
    assert read == [Path("text/a.txt")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "null"])
def test_a_record_that_is_damaged_is_made_anew(tree: Path, params: Params, content: str) -> None:
    before = of(params, "text/*.txt")
    (tree / ".checkpoints").mkdir()
    (tree / ".checkpoints/corpus.json").write_text(content)
    assert of(params, "text/*.txt") == before


def test_the_tokenizer_belongs_to_it(tree: Path, params: Params) -> None:
    (tree / "tokenizer.json").write_text("hello")
    found = of(params, "text/*.txt", tokenizer="tokenizer.json")
    assert found["tokenizer_sha256"] == HELLO
    assert found | {"tokenizer_sha256": None} == of(params, "text/*.txt")
    with pytest.raises(CalmError, match=r"^tokenizer other.json is missing; "):
        of(params, "text/*.txt", tokenizer="other.json")


def test_what_is_missing_is_told_as_by_tokenise(params: Params) -> None:
    with pytest.raises(CalmError, match=r"^corpus.paths: other/\*.txt matches no file$"):
        of(params, "other/*.txt")


def test_what_params_pin_is_told_by_name(params: Params) -> None:
    assert corpus_digest(params, Path(".checkpoints")) == {"source": "botocore", "tokenizer_sha256": None}
    hub = params.corpus.model_copy(update={"source": "huggingface", "dataset": "Salesforce/wikitext"})
    found = corpus_digest(params.model_copy(update={"corpus": hub}), Path(".checkpoints"))
    assert found == {"source": "huggingface", "dataset": "Salesforce/wikitext", "tokenizer_sha256": None}


def test_a_dataset_in_a_folder_is_text_of_the_users(tree: Path, params: Params) -> None:
    folder = params.model_copy(
        update={"corpus": params.corpus.model_copy(update={"source": "huggingface", "dataset": "text"})}
    )
    before = corpus_digest(folder, Path(".checkpoints"))
    assert before["bytes"] == 12
    a_line_more(tree / "text")
    assert corpus_digest(folder, Path(".checkpoints"))["bytes"] == 18


def test_by_file_the_names_that_decide_a_split_belong_to_it(tree: Path, tmp_path: Path, params: Params) -> None:
    """A folder that holds all files has another name: the same text in the same order, but other groups."""
    by_file = params.model_copy(update={"corpus": params.corpus.model_copy(update={"split_by": "file"})})
    (tree / "text").rename(tree / "a book")
    (tree / "text").mkdir()
    (tree / "a book").rename(tree / "text/a book")
    before, of_document = of(by_file, "text"), of(params, "text")
    shutil.copytree(tree / "text", tmp_path / "elsewhere")
    assert of(by_file, str(tmp_path / "elsewhere")) == before
    (tree / "text/a book").rename(tree / "text/b book")
    assert of(params, "text") == of_document
    assert of(by_file, "text") != before
    assert of(by_file, "text") | {"names_sha256": None} == before | {"names_sha256": None}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_a_field_holds_belongs_to_it(tree: Path, params: Params, kind: str) -> None:
    """The digest is of whole files: a change in any column is noticed, that which decides the split among them."""
    digests = []
    for site in ("x", "y"):
        table = pl.DataFrame({"text": ["one"], "site": [site]})
        path = tree / f"text/c.{kind}"
        table.write_parquet(path) if kind == "parquet" else table.write_ndjson(path)
        digests.append(of(params, str(path)))
    assert digests[0]["bytes"] == digests[1]["bytes"]
    assert digests[0] != digests[1]
