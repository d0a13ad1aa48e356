"""Names on the hub, against a hub on the loopback and `huggingface_hub`'s own cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from calm_core.errors import CalmError
from calm_core.storage.hub import local_folder
from tests.support.hub_server import Hub, hub_on_loopback, use_hub

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "autoencoder/config.json": b'{"inner": true}',
    "README.md": b"# Card",
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"state",
}


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        hub.models["someone/model"] = dict(MODEL)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub


def refusal(name: str | Path) -> str:
    with pytest.raises(CalmError) as raised:
        local_folder(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_name_becomes_a_folder_of_configs_weights_and_card(hub: Hub) -> None:
    left_out = {"pytorch_model.bin", "optimizer.pt"}
    assert files(local_folder("someone/model")) == {name: MODEL[name] for name in MODEL.keys() - left_out}
    assert files(local_folder(Path("someone/model"))).keys() == MODEL.keys() - left_out


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: Hub) -> None:
    del hub.models["someone/model"]["model.safetensors"]
    assert files(local_folder("someone/model"))["pytorch_model.bin"] == b"pickle"


def test_a_revision_is_a_commit_or_a_branch(hub: Hub) -> None:
    earlier = hub.commit("someone/model")
    assert local_folder("someone/model@main").name == earlier
    hub.models["someone/model"]["config.json"] = b'{"newer": 1}'
    assert files(local_folder(f"someone/model@{earlier}"))["config.json"] == b"{}"
    assert files(local_folder("someone/model"))["config.json"] == b'{"newer": 1}'
    assert "without a revision 'later'" in refusal("someone/model@later")


def test_the_cache_serves_when_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path)
        hub.models["someone/model"] = dict(MODEL)
        online = local_folder("someone/model")
    # The port is closed now.
    assert local_folder("someone/model") == online
    assert "someone/other is no folder here" in refusal("someone/other")
    assert "cannot be reached" in refusal("someone/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_folder("someone/model") == online
    (online / "model.safetensors").unlink()
    assert "no whole copy" in refusal("someone/model")


def test_a_folder_wins_and_is_not_asked_of_the_hub(hub: Hub) -> None:
    own = Path("someone/model")
    own.mkdir(parents=True)
    assert local_folder("someone/model") == own
    assert local_folder(own.absolute()) == own.absolute()
    assert not hub.requests


def test_what_can_only_be_a_path_is_not_asked_of_the_hub(hub: Hub) -> None:
    Path("folder").mkdir()
    for name in ("folder/model", "models/clam", "./someone/model", "/someone/model", "../a/b", "someone/a/b", "model"):
        assert f"{name} is no folder" in refusal(name)
    for name in ("someone/..", "someone/model@../main", "someone/model@", "some one/model", ".a/b", "-/b\n"):
        assert "is no folder" in refusal(name)
    assert not hub.requests


def test_what_the_hub_does_not_give_is_told_in_a_line(hub: Hub) -> None:
    assert "no such model, or a private one, which takes `hf auth login`" in refusal("someone/else")
    hub.gated.add("someone/model")
    assert "accept them on its page" in refusal("someone/model")
