"""Checkpoints go to this project's layout and back tensor for tensor, and wrong ones are refused with the list."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import AUTOENCODER, load_model, save_model
from tests.calm_core.reference.reference_data import KINDS, reference_weights, refusal, write_reference


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    source = write_reference(kind, tmp_path)
    told = import_checkpoint(source, tmp_path / "own")
    assert kind in told
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), reference_weights(kind))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("kind", ["autoencoder", "energy"])
def test_a_checkpoint_without_second_copies_loads(kind: str, tmp_path: Path) -> None:
    whole = reference_weights(kind)
    for left_out in ("decoder.lm_head_weight", "encoder.embed_tokens.weight"):
        single = {n: w for n, w in whole.items() if not n.endswith(left_out) and not n.startswith("mlp_generator.")}
        folder = tmp_path / left_out
        import_checkpoint(write_reference(kind, folder, single), folder / "own")
        export_checkpoint(folder / "own", folder / "back")
        assert same(load_file(folder / "back/model.safetensors"), whole)


def test_bfloat16_comes_back_as_bfloat16(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in reference_weights("flow").items()}
    import_checkpoint(write_reference("flow", tmp_path, weights), tmp_path / "own")
    assert load_model(Calm, tmp_path / "own").backbone.norm.weight.dtype == torch.float32
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), weights)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [True, False])
def test_every_way_of_saving_reads_the_same(suffix: str, sharded: bool, tmp_path: Path) -> None:
    weights = reference_weights("energy")
    source = write_reference("energy", tmp_path)
    (source / "model.safetensors").unlink()
    save = save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if sharded:
        half = len(weights) // 2
        names = list(weights)
        parts = {f"{stem}-1.{suffix}": names[:half], f"{stem}-2.{suffix}": names[half:]}
        for file, part in parts.items():
            save({name: weights[name] for name in part}, source / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (source / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    else:
        save(weights, source / f"{stem}.{suffix}")
    import_checkpoint(source, tmp_path / "own")
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    assert same(load_file(tmp_path / "back/model.safetensors"), weights)


@pytest.mark.parametrize("head", [EnergyHeadConfig(3, 6), DiffusionHeadConfig(1), FlowHeadConfig(2)])
def test_other_shapes_go_there_and_back(head: AnyHeadConfig, tmp_path: Path) -> None:
    autoencoder = Autoencoder(AutoencoderConfig(31, 3, 20, 28, 10, 4, 6))
    calm = Calm(CalmConfig(31, 3, 10, BackboneConfig(24, 36, 3, 6, 2, 500.0), head))
    for model in (autoencoder, calm):
        model.initialise(torch.Generator().manual_seed(0))
    save_model(calm, None, tmp_path / "calm", 96)
    save_model(autoencoder, None, tmp_path / "calm" / AUTOENCODER)
    export_checkpoint(tmp_path / "calm", tmp_path / "theirs")
    exported = load_file(tmp_path / "theirs/model.safetensors")
    assert {
        "ae_model.encoder.encoder_layers.3.layernorm.weight",
        "transformer.layers.2.self_attn.k_proj.weight",
    } <= set(exported)
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    again = load_model(Calm, tmp_path / "again")
    assert again.config == calm.config
    assert same(again.state_dict(), calm.state_dict())
    inner = load_model(Autoencoder, tmp_path / "again" / AUTOENCODER)
    assert same(inner.state_dict(), autoencoder.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_missing_tensor_is_named(kind: str, first: int, tmp_path: Path) -> None:
    whole = reference_weights(kind)
    for number, name in enumerate(sorted(whole)[first::3]):
        if name.endswith(("lm_head_weight", "encoder.embed_tokens.weight")):
            continue  # two names of one tensor
        source = write_reference(kind, tmp_path / str(number), {n: w for n, w in whole.items() if n != name})
        assert re.search(
            rf"is refused: lacks .*{re.escape(name.removeprefix('ae_model.'))}", refusal(source, tmp_path / "own")
        )


def test_unknown_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    weights = reference_weights("diffusion")
    weights["extra.weight"] = torch.zeros(2)
    weights["transformer.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    weights["transformer.norm.weight"] = torch.zeros(65)
    del weights["embed_proj.3.bias"]
    told = refusal(write_reference("diffusion", tmp_path, weights), tmp_path / "own")
    assert "extra.weight" in told
    assert "transformer.layers.7.mlp.up_proj.weight" in told
    assert "transformer.norm.weight [65] instead of [64]" in told
    assert re.search(r"lacks .*embed_proj.3.bias", told)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    weights = reference_weights("energy")
    weights["mlp_generator.norm_noise.bias"] += 1
    told = refusal(write_reference("energy", tmp_path, weights), tmp_path / "own")
    assert "mlp_generator.norm_noise.bias differs from generative_head.norm_noise.bias" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the weights have 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, the weights have 4"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; it has to divide the hidden size 64"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', here it is always 'silu'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"rope_theta": "much"}, "rope_theta is 'much', a positive number is needed"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"rms_norm_eps": "little"}, "rms_norm_eps is 'little', a positive number is needed"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    source = write_reference("energy", tmp_path)
    edit_config(source, **changes)
    assert told in refusal(source, tmp_path / "own")


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nothing", tmp_path / "own")
    source = write_reference("flow", tmp_path)
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    assert "is missing or damaged" in refusal(source, tmp_path / "own")
    weights.unlink()
    assert "holds no weights; one of model.safetensors" in refusal(source, tmp_path / "own")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "outside its folder" in refusal(source, tmp_path / "own")
    index.write_text("[]")
    assert "holds no JSON object" in refusal(source, tmp_path / "own")
    index.unlink()
    (source / "config.json").write_text("{")
    assert "config.json is no JSON" in refusal(source, tmp_path / "own")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    source, weights = write_reference("flow", tmp_path), reference_weights("flow")
    (source / "model.safetensors").unlink()
    for save, stem, suffix in ((save_file, "model", "safetensors"), (torch.save, "pytorch_model", "bin")):
        places = {name: f"{stem}-{number % 2}.{suffix}" for number, name in enumerate(sorted(weights))}
        save({name: weights[name] for name, place in places.items() if "-0" in place}, source / f"{stem}-0.{suffix}")
        index = source / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        told = refusal(source, tmp_path / "own")
        assert told.startswith(f"{source}/{stem}-1.{suffix} is missing or damaged (")
        assert told.endswith("; fetch it again")
        index.unlink()
        assert f"is needed; it has {stem}-0.{suffix}" in refusal(source, tmp_path / "own")
        (source / f"{stem}-0.{suffix}").unlink()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weight": torch.zeros(1), "step": 3}, "pytorch_model.bin holds 'step' of type int, no tensor; the weights"),
        ({"model": {"weight": torch.zeros(1)}}, "pytorch_model.bin holds 'model' of type dict, no tensor; the weights"),
        ([torch.zeros(1)], "pytorch_model.bin holds a list, no tensors by name; the weights of a model are needed, a"),
        ({3: torch.zeros(1)}, "pytorch_model.bin: 3 is no plain tensor"),
        # Of one that torch stumbles over with no more than a number to tell.
        (b"junk\n", "pytorch_model.bin cannot be read: it is damaged (KeyError: 174812789); fetch it again"),
        (b"", "pytorch_model.bin cannot be read: it is damaged (EOFError); fetch it again"),
    ],
)
def test_a_bin_without_tensors_by_name(content: Any, told: str, tmp_path: Path) -> None:
    source = write_reference("flow", tmp_path)
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert told in refusal(source, tmp_path / "own")


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    source = write_reference("energy", tmp_path)
    beside = source / "tokenizer.json"
    for content, told in ((b"", "Expecting value"), (b"{}", "a JSON object with a model is needed")):
        beside.write_bytes(content)
        refused = refusal(source, tmp_path / "own")
        assert refused.startswith(f"{beside} is no tokenizer.json: {told}")
        assert refused.endswith("; --tokenizer names another in its place")
    for given, file in ((tmp_path / "none.json", "none.json"), (tmp_path, "tokenizer.json")):
        with pytest.raises(CalmError) as caught:
            import_checkpoint(source, tmp_path / "own", given)
        expected = f"--tokenizer {given}: {tmp_path / file} is missing; name a tokenizer.json or its folder"
        assert str(caught.value) == expected


class Harmful:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_reference("flow", tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, source / "pytorch_model.bin")
    told = refusal(source, tmp_path / "own")
    assert "cannot be read" in told
    assert "weights_only" not in told  # torch's text advises to read it with trust
    assert not (tmp_path / "harm").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = write_reference("flow", tmp_path)
    with pytest.raises(CalmError, match="exists; name a new folder"):
        import_checkpoint(source, source)
    import_checkpoint(source, tmp_path / "own")
    with pytest.raises(CalmError, match="exists; name a new folder"):
        export_checkpoint(tmp_path / "own", source)


def test_a_token_head_is_not_exported(tmp_path: Path) -> None:
    model = Calm(CalmConfig(11, 2, 8, BackboneConfig(8, 12, 1, 2, 1), TokenHeadConfig(8, 12, 1)))
    save_model(model, None, tmp_path / "own")
    with pytest.raises(CalmError, match="own has a token head, which the reference") as caught:
        export_checkpoint(tmp_path / "own", tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists()
