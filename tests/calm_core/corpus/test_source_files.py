"""Which files a corpus is read from, in folders as people have them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_core.corpus.documents import documents
from calm_core.corpus.text_files import source_files
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params


def found(params: Params, *patterns: str, **changes: Any) -> list[str]:
    changes = {"source": "files", "paths": list(patterns), **changes}
    corpus = CorpusParams.model_validate({**params.corpus.model_dump(), **changes})
    return [str(path) for path in source_files(corpus)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"text of {name}")


BESIDE = ["README.md", "readme.txt", "README.zh.md", "LICENSE", "LICENSE.txt", "LICENSE-MIT.md", "dataset_infos.json",
          "_SUCCESS", ".gitkeep", ".DS_Store", ".a.txt.crc", ".hidden.txt", "_metadata.txt", "__MACOSX/._a.txt",
          "_temporary/0/part.txt", ".cache/b.txt", ".git/b.txt", "a.csv", "picture.png", "SHA256SUMS"]  # fmt: skip


@pytest.mark.parametrize("pattern", ["data", "data/", "./data", "data/**", "data/**/*", "da*"])
def test_what_stands_beside_data_is_left_out(params: Params, pattern: str) -> None:
    write("data/b.TXT", "data/sub/A.Text.GZ", *(f"data/{name}" for name in BESIDE))
    if pattern == "da*":  # a folder that a glob finds is no file
        with pytest.raises(CalmError, match="matches no file"):
            found(params, pattern)
    else:
        assert found(params, pattern) == ["data/b.TXT", "data/sub/A.Text.GZ"]


def test_what_is_read_and_left_out_is_told_once(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    write("data/1.txt", "data/2.txt", "data/README.md", "data/x.csv", "data/_SUCCESS", "data/.hidden")
    corpus = params.corpus.model_copy(update={"source": "files", "paths": ["data"]})
    assert list(documents(corpus)) == ["text of data/1.txt", "text of data/2.txt"]
    told = "corpus: 2 files, 36 bytes: data/1.txt, data/2.txt; left out: data/README.md, data/x.csv\n"
    assert capsys.readouterr().err == told
    write(*(f"data/{number}.txt" for number in range(10, 13)))
    list(documents(corpus))
    assert "5 files, 93 bytes: data/1.txt, data/10.txt, data/11.txt and 2 more; " in capsys.readouterr().err


def test_what_is_named_is_read(params: Params) -> None:
    write("README.md", "_part.txt", ".hidden.txt", "docs/README.md", "docs/a.md", "_raw/.x/a.txt", "only/README.md")
    assert found(params, "README.md", "_part.txt", ".hidden.txt") == ["README.md", "_part.txt", ".hidden.txt"]
    assert found(params, "_raw/.x") == ["_raw/.x/a.txt"]
    assert found(params, "_p*.txt") == ["_part.txt"]
    assert found(params, "docs/*.md") == ["docs/a.md"]
    assert found(params, "only") == ["only/README.md"]  # there is nothing else


def test_an_archive_beside_what_was_unpacked_of_it(params: Params) -> None:
    write("data/a.txt", "data/a.txt.gz", "data/b.jsonl.ZST", "data/c.txt.xz", "data/c.txt.bz2")
    assert found(params, "data") == ["data/a.txt", "data/b.jsonl.ZST", "data/c.txt.bz2", "data/c.txt.xz"]
    assert found(params, "data/a.txt.gz") == ["data/a.txt.gz"]


def test_an_empty_path_is_no_folder(params: Params) -> None:
    write("a.txt")
    with pytest.raises(CalmError, match="an empty path"):
        found(params, " ")


def test_each_file_once(params: Params) -> None:
    write("data/a.txt", "data/b.txt", "other/c.txt")
    Path("data/link.txt").symlink_to("a.txt")
    Path("data/up").symlink_to("..")
    Path("data/other").symlink_to("../other")
    Path("data/broken.txt").symlink_to("nowhere.txt")
    for name in ("again", "and again", "once more"):  # by loops in loops there is no end of names
        Path(f"data/{name}").symlink_to("../data")
    assert found(params, "data/b.txt", "data") == ["data/b.txt", "data/a.txt", "data/other/c.txt"]
    assert found(params, "data", "other") == ["data/a.txt", "data/b.txt", "data/other/c.txt"]
    assert found(params, "./data/a.txt", "data/*.txt", str(Path("data/a.txt").resolve())) == [
        "data/a.txt",
        "data/b.txt",
    ]


def test_home_and_variables(params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("text/a.txt", "~/b.txt", "$HOME/c.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in ("~/text", "~/text/*.txt", "$HOME/text/a.txt", "${HOME}/text"):
        assert found(params, pattern) == [str(tmp_path / "text/a.txt")]
    assert found(params, "./~/b.txt", "./$HOME/c.txt") == ["~/b.txt", "$HOME/c.txt"]
    assert found(params, source="huggingface", dataset="~/text") == [str(tmp_path / "text/a.txt")]
    with pytest.raises(CalmError, match=r"\$NO_SUCH/a.txt matches no file; is the variable set\?"):
        found(params, "$NO_SUCH/a.txt")


def test_the_cache_of_the_hub(params: Params) -> None:
    repository = Path("hub/datasets--org--name")
    for number, revision in enumerate(("old", "new")):
        write(f"{repository}/blobs/{number}", f"{repository}/blobs/card")
        folder = repository / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        (folder / "train.txt").symlink_to(f"../../../blobs/{number}")
        (folder.parent / "README.md").symlink_to("../../blobs/card")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("new")
    assert found(params, str(repository)) == [f"{repository}/snapshots/new/data/train.txt"]
    assert found(params, "hub") == [f"{repository}/snapshots/new/data/train.txt"]
    (repository / "refs/main").unlink()
    assert len(found(params, "hub")) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.csv", "a.csv is of an unknown format; known endings: .txt, .* make it Parquet"),
        ("a.zip", "unpack it"),
        ("a.gz", "unknown format"),
        ("noending", "unknown format"),
        ("data-00000-of-00001.arrow", "load_from_disk"),
    ],
)
def test_other_formats(params: Params, name: str, told: str) -> None:
    write(name, f"folder/{name}", "folder/dataset_info.json")
    with pytest.raises(CalmError, match=told):
        found(params, name)
    with pytest.raises(
        CalmError, match=f"matches no file of a known format; there are: folder/{name}, .*; known endings"
    ):
        found(params, "folder")
    write("folder/a.txt")
    assert found(params, "folder") == ["folder/a.txt"]


def test_names_of_any_kind(params: Params) -> None:
    Path("data").mkdir()
    names = [b"a\nb.txt", b"[1] *.txt", b"cost $HOME.txt", b"caf\xe9.txt", b"~.txt", b"-x.txt", b"a b#.txt"]
    for number, name in enumerate(list(names)):
        try:
            Path(os.fsdecode(b"data/" + name)).write_text(f"text {number}")
        except OSError:  # macOS takes only characters that it knows
            names.remove(name)
    (Path("data") / "folder.txt").mkdir()
    os.mkfifo("data/pipe.txt")
    corpus = params.corpus.model_copy(update={"source": "files", "paths": ["data"]})
    assert len(set(documents(corpus))) == len(names) >= 6
    for name in names:
        assert found(params, os.fsdecode(b"data/" + name)) == [os.fsdecode(b"data/" + name)]
    with pytest.raises(CalmError, match="pipe.txt matches no file: data/pipe.txt is a pipe, a device, or"):
        found(params, "data/pipe.txt")


def test_a_folder_that_may_not_be_read_is_named(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    write("data/a.txt", "data/private/b.txt")
    original = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "private":
            raise PermissionError(13, "Permission denied", str(folder))
        return original(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(CalmError, match="^corpus.paths: data/private: Permission denied$"):
        found(params, "data")


def test_a_file_that_may_not_be_read_is_told_before_any(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    write("data/a.txt", "data/b.txt")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt" and allowed(path, mode))
    corpus = params.corpus.model_copy(update={"source": "files", "paths": ["data"]})
    with pytest.raises(CalmError, match="data/b.txt cannot be read: permission denied"):
        next(documents(corpus))
