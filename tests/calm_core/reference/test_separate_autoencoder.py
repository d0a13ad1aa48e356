"""A language model and its autoencoder from two places, as the published ones are: joined, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.cli import main
from calm_core.errors import CalmError
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import AUTOENCODER, load_model, read_config
from tests.calm_core.reference.reference_data import reference_weights, write_reference
from tests.calm_core.reference.test_newer_configs import vocabulary
from tests.calm_core.tokens.published import write
from tests.support.hub_server import hub_on_loopback, use_hub

SERVER = "/mnt/training/checkpoints/autoencoder"


def alone(kind: str = "energy") -> dict[str, Tensor]:
    """The language model's own tensors."""
    return {name: weight for name, weight in reference_weights(kind).items() if not name.startswith("ae_model.")}


def published(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> tuple[Path, Path]:
    """A language model and its autoencoder in two folders; its config names a folder of another machine."""
    source = write_reference("energy", folder, alone() if weights is None else weights)
    config = json.loads((source / "config.json").read_text()) | {"ae_path": SERVER} | changes
    (source / "config.json").write_text(json.dumps(config))
    return source, write_reference("autoencoder", folder)


def refusal(source: Path, autoencoder: Path | str | None) -> str:
    destination = source.parent / "own"
    with pytest.raises(CalmError) as caught:
        import_checkpoint(source, destination, autoencoder=autoencoder)
    assert not destination.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_two_places_make_the_model_that_one_file_makes(tmp_path: Path) -> None:
    source, autoencoder = published(tmp_path)
    assert import_checkpoint(source, tmp_path / "own", autoencoder=autoencoder) == "language model with energy head"
    import_checkpoint(write_reference("energy", tmp_path / "whole"), tmp_path / "one")
    for name, model_class in (("", Calm), (AUTOENCODER, Autoencoder)):
        found, expected = (load_model(model_class, tmp_path / place / name) for place in ("own", "one"))
        assert found.config == expected.config
        assert same(found.state_dict(), expected.state_dict())
    # The reference itself saves a language model with its autoencoder in the file.
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), reference_weights("energy"))
    assert json.loads((tmp_path / "back/config.json").read_text())["ae_path"] == SERVER
    export_checkpoint(tmp_path / "own" / AUTOENCODER, tmp_path / "autoencoder back")
    assert same(load_file(tmp_path / "autoencoder back/model.safetensors"), reference_weights("autoencoder"))
    config = json.loads((tmp_path / "autoencoder back/config.json").read_text())
    assert config == json.loads((autoencoder / "config.json").read_text())


@pytest.mark.parametrize(("key", "value", "told"), [
    ("ae_path", SERVER, f"(config.json names ae_path '{SERVER}')"),
    ("ae_name_or_path", SERVER, f"(config.json names ae_name_or_path '{SERVER}')"),
    ("ae_path", None, "(config.json names none)"),
])  # fmt: skip
def test_a_language_model_alone_is_refused(key: str, value: str | None, told: str, tmp_path: Path) -> None:
    source, _ = published(tmp_path, ae_path=None)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    refused = refusal(source, None)
    assert refused.startswith(f"{source} is a language model without its autoencoder: name that by --autoencoder")
    assert refused.endswith(told)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    source, autoencoder = published(tmp_path)
    assert "is an autoencoder itself; --autoencoder goes with a language model" in refusal(autoencoder, autoencoder)
    assert f"{source} is a language model; --autoencoder takes its" in refusal(source, source)
    assert "nothing is no folder" in refusal(source, tmp_path / "nothing")
    weights = reference_weights("autoencoder")
    for name in ("encoder.embed_tokens.weight", "decoder.lm_head_weight"):
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, autoencoder / "model.safetensors")
    config = json.loads((autoencoder / "config.json").read_text())
    assert f"{autoencoder} is refused: config.json: vocab_size is 96" in refusal(source, autoencoder)
    (autoencoder / "config.json").write_text(json.dumps(config | {"vocab_size": 95}))
    assert "the language model has vocabulary 96 and K 4, its autoencoder 95 and 4" in refusal(source, autoencoder)


def test_an_autoencoder_inside_counts_and_the_other_has_to_be_the_same(tmp_path: Path) -> None:
    weights = reference_weights("energy")
    source, autoencoder = published(tmp_path, weights)
    import_checkpoint(source, tmp_path / "both", autoencoder=autoencoder)
    export_checkpoint(tmp_path / "both", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), weights)
    # Saved in 16 bits, the one inside is the other one, rounded.
    rounded = {name: weight.bfloat16() if "ae_model" in name else weight for name, weight in weights.items()}
    save_file(rounded, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "rounded", autoencoder=autoencoder)
    inside = load_model(Autoencoder, tmp_path / "rounded" / AUTOENCODER).encoder.norm.weight
    assert torch.equal(inside, weights["ae_model.encoder.norm.weight"].bfloat16().float())
    weights["ae_model.encoder.norm.weight"] = weights["ae_model.encoder.norm.weight"] + 0.5
    save_file(weights, source / "model.safetensors")
    told = refusal(source, autoencoder)
    assert f"{source} has an autoencoder of its own, other than {autoencoder}: their encoder.norm.weight differ" in told
    assert told.endswith("leave --autoencoder out to keep it")


@pytest.mark.parametrize("where", ["energy", "autoencoder"])
def test_the_tokenizer_of_either_place(where: str, tmp_path: Path) -> None:
    source, autoencoder = published(tmp_path)
    expected = write(vocabulary(95), tmp_path / where)
    if where == "energy":
        write(vocabulary(96), autoencoder)  # the language model's comes first
    import_checkpoint(source, tmp_path / "own", autoencoder=autoencoder)
    for inner in ("", AUTOENCODER):
        found = json.loads((tmp_path / "own" / inner / "tokenizer.json").read_text())
        assert found["model"] == json.loads(expected.read_text())["model"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_16_bits_in_shards_stay_16_bits(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, which end in the middle of rows, and with tensors of two types in one file."""
    monkeypatch.setattr("calm_core.reference.untrusted_weights.PIECE", 601)
    monkeypatch.setattr("calm_core.reference.untrusted_weights.MAPPED", 20_000)
    weights = {name: weight.bfloat16() if weight.ndim == 2 else weight for name, weight in alone().items()}
    source, autoencoder = published(tmp_path, {})
    (source / "model.safetensors").unlink()
    save, stem = (save_file, "model") if suffix == "safetensors" else (torch.save, "pytorch_model")
    places = {name: f"{stem}-{number % 3}.{suffix}" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save({name: weights[name] for name, place in places.items() if place == file}, source / file)
    (source / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    import_checkpoint(source, tmp_path / "own", autoencoder=autoencoder)
    held = load_file(tmp_path / "own/model.safetensors")
    assert {weight.dtype for weight in held.values() if weight.ndim == 2} == {torch.bfloat16}
    assert torch.equal(held["patch_embedding.embedding.weight"], weights["transformer.embed_tokens.weight"])
    model = load_model(Calm, tmp_path / "own")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    prefixed = {f"ae_model.{name}": weight for name, weight in reference_weights("autoencoder").items()}
    assert same(load_file(tmp_path / "back/model.safetensors"), weights | prefixed)
    # As safetensors itself writes it, byte for byte.
    save_file(weights | prefixed, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calm", "import-checkpoint", "someone/CALM", "own", "--autoencoder", "someone/Autoencoder@main"]
    source, autoencoder = published(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        for name, folder in (("someone/CALM", source), ("someone/Autoencoder", autoencoder)):
            hub.models[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        for offline in (False, True):
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
            monkeypatch.setattr("sys.argv", [*command[:3], f"own {offline}", *command[4:]])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, capsys.readouterr().err
    for offline in (False, True):
        export_checkpoint(Path(f"own {offline}"), Path(f"back {offline}"))
        assert same(load_file(f"back {offline}/model.safetensors"), reference_weights("energy"))
        for inner, base in (("", "someone/CALM"), (AUTOENCODER, "someone/Autoencoder")):
            assert read_config(Path(f"own {offline}") / inner)["base_model"] == base
