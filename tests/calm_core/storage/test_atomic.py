"""Files and folders are replaced on file systems that refuse what others can do; the system's calls are stand-ins."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from calm_core.storage.atomic import move_into_place, scratch_folder, whole_directory, write_text
from calm_core.storage.resumable import FinishedFiles


def refusing(number: int, when: Any = lambda *arguments: True, call: Any = None) -> Any:
    def refuse(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments, **options)

    return refuse


def fill(folder: Path, text: str) -> None:
    with whole_directory(folder) as fresh:
        (fresh / "file").write_text(text)


def test_a_folder_of_a_containers_image_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """overlayfs renames no folder of a lower layer."""
    fill(tmp_path / "tokens", "old")
    lower = refusing(errno.EXDEV, lambda path, to: path == tmp_path / "tokens", Path.rename)
    monkeypatch.setattr(Path, "rename", lower)
    fill(tmp_path / "tokens", "new")
    assert (tmp_path / "tokens/file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_another_error_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "tokens", "old")
    monkeypatch.setattr(Path, "rename", refusing(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        fill(tmp_path / "tokens", "new")
    assert (tmp_path / "tokens/file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO])
def test_fsync_that_is_not_known(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fresh").write_text("new")
    monkeypatch.setattr(os, "fsync", refusing(number))
    if number == errno.EIO:  # the content is not on the disk
        with pytest.raises(OSError, match="Input/output"):
            move_into_place(tmp_path / "fresh", tmp_path / "file")
        assert not (tmp_path / "file").exists()
        return
    move_into_place(tmp_path / "fresh", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"


def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = FinishedFiles(tmp_path / "kept", "tokenise")
    with kept.scratch() as scratch:
        (scratch / "shard.bin").write_bytes(b"tokens")
        digest = kept.keep(scratch / "shard.bin")
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    kept.put("shard.bin", digest, tmp_path)
    assert (tmp_path / "shard.bin").read_bytes() == b"tokens"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "params.yaml", "old")
    monkeypatch.setattr(os, "replace", refusing(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        write_text(tmp_path / "params.yaml", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    assert (tmp_path / "params.yaml").read_text() == "old"
    with scratch_folder(tmp_path) as scratch:
        (scratch / "file").touch()
    assert not scratch.exists()
