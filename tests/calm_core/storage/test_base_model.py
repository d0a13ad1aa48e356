"""What a model was made from: the hub's own name for it, or what its folder says."""

import json
from pathlib import Path
from typing import Any

import pytest

from calm_core.errors import CalmError
from calm_core.storage.base_model import base_model_of


def model(folder: Path, told: Any = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({} if told is None else {"base_model": told}))
    return folder


def test_a_name_on_the_hub_or_else_what_the_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fetched = model(tmp_path / "cache", "someone/grandparent")
    assert base_model_of("someone/parent", fetched) == "someone/parent"
    assert base_model_of("someone/parent@v1.2", fetched) == "someone/parent"
    # A folder of two names looks like a model on the hub.
    for name in ("imported/model", "./imported/model", tmp_path / "imported/model"):
        folder = Path(name) if Path(name).is_dir() else model(tmp_path / "imported/model", "someone/parent")
        assert base_model_of(name, folder) == "someone/parent"
    assert base_model_of("own", model(tmp_path / "own")) is None


@pytest.mark.parametrize("told", ["parent", "someone/parent@main", "a/b/c", 'a/b"\n---', "", 1, ["someone/parent"]])
def test_what_is_no_name_is_refused(told: Any, tmp_path: Path) -> None:
    folder = model(tmp_path / "own", told)
    with pytest.raises(
        CalmError, match=r"own/config\.json is damaged: base_model is .*; put it right or delete"
    ) as raised:
        base_model_of(folder, folder)
    assert "\n" not in str(raised.value)
