"""config.json as versions of transformers, and relatives of Llama, write it: read right, or refused with key and value.

And the tokenizer beside the weights: compared with their rows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaModel

from calm_core.calm.model import Calm
from calm_core.errors import CalmError
from calm_core.inference.language_model import load_language_model
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import load_model
from tests.calm_core.reference.reference_data import reference_weights, refusal, write_reference
from tests.calm_core.tokens.published import PUBLISHED, byte_level, write

DEFAULT = {"rope_type": "default"}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def source_with(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """The energy model's checkpoint with other settings; its own are rope_theta 10,000 and rope_scaling null."""
    source = write_reference("energy", folder)
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without} | changes
    (source / "config.json").write_text(json.dumps(config))
    return source


def theta(folder: Path) -> float:
    return load_model(Calm, folder).config.backbone.rope_theta


def refusal_of_config(source: Path) -> str:
    told = refusal(source, source.parent / "own")
    assert told.startswith(f"{source} is refused: config.json: ")
    return told


OLD = ("rope_theta", "rope_scaling")


@pytest.mark.parametrize(
    ("changes", "without", "expected"),
    [
        ({"rope_theta": 500_000.0}, (), 500_000.0),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 500_000.0}}, OLD, 500_000.0),
        ({"rope_parameters": {"rope_theta": 500_000}}, OLD, 500_000.0),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 500_000.0}, "rope_theta": 500_000}, OLD, 500_000.0),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 500_000.0}, "rope_theta": None}, OLD, 500_000.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 25_000.0}, OLD, 25_000.0),
        ({"rope_scaling": {**DEFAULT, "rope_theta": 25_000.0}}, OLD, 25_000.0),
        ({"rope_parameters": None}, OLD, 10_000.0),
        ({"rope_parameters": DEFAULT}, OLD, 10_000.0),
        ({}, OLD, 10_000.0),
    ],
)
def test_the_rotary_base_wherever_it_stands(
    changes: dict[str, Any], without: tuple[str, ...], expected: float, tmp_path: Path
) -> None:
    import_checkpoint(source_with(tmp_path, changes, without), tmp_path / "own")
    assert theta(tmp_path / "own") == expected


def test_a_config_that_transformers_writes(tmp_path: Path) -> None:
    written = json.loads(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=96,
            max_position_embeddings=256,
            rope_theta=500_000.0,
            dtype="bfloat16",
        ).to_json_string()
    )
    assert "rope_theta" not in written
    import_checkpoint(source_with(tmp_path, written, (*OLD, "torch_dtype")), tmp_path / "own")
    assert theta(tmp_path / "own") == 500_000.0
    # And it goes back as one that says the same in both ways.
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert theta(tmp_path / "again") == 500_000.0


def test_the_epsilon_of_the_backbones_norms(tmp_path: Path) -> None:
    source = source_with(tmp_path, {"rms_norm_eps": 0.01})
    import_checkpoint(source, tmp_path / "own")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = json.loads((source / "config.json").read_text())
    theirs = LlamaModel(LlamaConfig(**{key: config[key] for key in (*sizes, "vocab_size", "rms_norm_eps")})).eval()
    weights = reference_weights("energy")
    theirs.load_state_dict({name: weights[f"transformer.{name}"] for name in theirs.state_dict()})
    embeddings = torch.randn(2, 5, config["hidden_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_model(Calm, tmp_path / "own").backbone(embeddings)
        torch.testing.assert_close(found, theirs(inputs_embeds=embeddings).last_hidden_state, atol=1e-5, rtol=1e-5)
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    # Where config.json names none it is the published one.
    (tmp_path / "plain").mkdir()
    import_checkpoint(source_with(tmp_path / "plain", {}, ("rms_norm_eps",)), tmp_path / "published")
    assert load_model(Calm, tmp_path / "published").config.backbone.norm_epsilon == 1e-6


def test_an_autoencoder_has_the_published_epsilon(tmp_path: Path) -> None:
    source = write_reference("autoencoder", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert "rms_norm_eps is 1e-05, an autoencoder's is always 1e-06" in refusal_of_config(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"head_dim": 16},
        {"head_dim": None, "attention_bias": None, "num_key_value_heads": None},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 256},
        {"partial_rotary_factor": 1.0, "no_rope_layers": [1, 1], "quantization_config": None},
        {"dtype": "bfloat16", "model_type": "energy", "tie_word_embeddings": False, "pretraining_tp": 1},
    ],
)
def test_settings_that_leave_the_model_as_it_is(changes: dict[str, Any], tmp_path: Path) -> None:
    import_checkpoint(source_with(tmp_path, changes), tmp_path / "own")
    import_checkpoint(write_reference("energy", tmp_path / "plain"), tmp_path / "other")
    assert load_model(Calm, tmp_path / "own").config == load_model(Calm, tmp_path / "other").config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_scaling": LLAMA_3}, "rope_scaling is {'rope_type': 'llama3', 'factor': 8.0"),
        ({"rope_parameters": {**LLAMA_3, "rope_theta": 10_000.0}}, "rope_parameters is {'rope_type': 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "here it is always None or of rope_type 'default'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is {'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is {'type': 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is {'factor': 2.0}"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"full_attention": {**DEFAULT, "rope_theta": 1e6}}}, "one for all layers"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor is 0.5, here it is always 1.0"),
        ({"rope_parameters": {**DEFAULT, "rope_theta": 500_000.0}},
         "rope_theta is 10000, rope_parameters.rope_theta is 500000; they have to be the same"),
        ({"rope_parameters": {**DEFAULT, "rope_theta": "5e5"}}, "rope_parameters.rope_theta is '5e5', a positive"),
        ({"rope_theta": 0}, "rope_theta is 0, a positive number is needed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, here it is always 1.0"),
        ({"head_dim": 32}, "head_dim is 32, the weights have 16"),
        ({"attention_bias": True}, "attention_bias is True, here it is always False"),
        ({"mlp_bias": True}, "mlp_bias is True, here it is always False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', here it is always 'silu'"),
        ({"sliding_window": 128}, "sliding_window is 128, here it is always None"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, here it is always None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"num_attention_heads": True}, "num_attention_heads is True; it has to divide the hidden size 64"),
        ({"num_attention_heads": None, "text_config": {"num_attention_heads": 4}},
         "text_config holds settings of its own, which have to stand at the top level"),
        ({"model_type": "flow"}, "model_type is 'flow', the weights have a head of kind 'energy'"),
        ({"vocab_size": 97}, "vocab_size is 97, the weights have 96"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert told in refusal_of_config(source_with(tmp_path, changes))


def test_an_autoencoders_settings_count_too(tmp_path: Path) -> None:
    source = write_reference("autoencoder", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "mlp_bias": True}))
    told = refusal_of_config(source)
    assert "hidden_act is 'gelu', here it is always 'silu', mlp_bias is True, here it is always False" in told


def vocabulary(size: int) -> Tokenizer:
    """A tokenizer with ids below ``size``."""
    return Tokenizer(models.WordLevel({"a": 0, "<eos>": size - 1}, unk_token="a"))


@pytest.mark.parametrize("kind", ["autoencoder", "energy"])
@pytest.mark.parametrize(("size", "fits"), [(96, True), (95, True), (97, False), (94, False), (40, False)])
def test_the_tokenizer_is_compared_with_the_rows(kind: str, size: int, fits: bool, tmp_path: Path) -> None:
    """96 rows: as many ids, or one less for the row of [PAD]."""
    source = write_reference(kind, tmp_path)
    elsewhere = write(vocabulary(size), tmp_path / "given")
    for given in (elsewhere, None):
        if given is None:
            elsewhere.rename(source / "tokenizer.json")
        own = tmp_path / f"own {given is None}"
        if fits:
            import_checkpoint(source, own, given)
            assert (own / "tokenizer.json").is_file()
            continue
        with pytest.raises(CalmError) as caught:
            import_checkpoint(source, own, given)
        told = (
            f"{given or source / 'tokenizer.json'} has {size} token ids, the model 96 rows; the model's own tokenizer"
        )
        assert str(caught.value).startswith(told)
        assert not own.exists()


def test_a_model_folder_with_another_tokenizer(tmp_path: Path) -> None:
    source = write_reference("energy", tmp_path)
    import_checkpoint(source, tmp_path / "without")
    with pytest.raises(CalmError, match=r"without/tokenizer.json is missing; the one that the model was trained with"):
        load_language_model(tmp_path / "without")
    import_checkpoint(source, tmp_path / "own", write(vocabulary(96), tmp_path / "given").parent)
    assert load_language_model(tmp_path / "own").tokenizer.get_vocab_size() == 2
    # As many ids, other tokens.
    write(Tokenizer(models.WordLevel({"b": 0, "<eos>": 95}, unk_token="b")), tmp_path / "own")
    with pytest.raises(CalmError, match=r"own/tokenizer.json has other tokens than .*own/autoencoder/tokenizer.json"):
        load_language_model(tmp_path / "own")
    for size in (98, 60):
        write(vocabulary(size), tmp_path / "own")
        with pytest.raises(CalmError, match=rf"own/tokenizer.json has {size} token ids, the model 96 rows"):
            load_language_model(tmp_path / "own")


def resized(weights: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """``weights`` with so many rows in each embedding, the first ones repeated."""
    names = ("embed_tokens.weight", "lm_head_weight")
    return {
        name: weight[torch.arange(rows) % len(weight)].contiguous() if name.endswith(names) else weight
        for name, weight in weights.items()
    }


def test_settings_of_a_tokenizer_are_off_in_an_imported_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_with(tmp_path, {"vocab_size": 301})
    save_file(resized(reference_weights("energy"), 301), source / "model.safetensors")
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    plain = byte_level("<eos>")
    write(plain, source, truncation=truncation)
    import_checkpoint(source, tmp_path / "own")
    text = "the quick brown fox jumps over the lazy dog " * 5
    model = load_language_model(tmp_path / "own")
    assert model.encode(text) == plain.encode(text).ids
    assert model.decode(model.encode(text)) == text
    assert json.loads((tmp_path / "own/tokenizer.json").read_text())["truncation"] is None
    # A folder that was made before, with such a file in it.
    write(plain, tmp_path / "own", truncation=truncation)
    assert load_language_model(tmp_path / "own").encode(text) == plain.encode(text).ids
    assert capsys.readouterr().err == ""
    given = write(PUBLISHED["uncased"](), tmp_path / "given")
    import_checkpoint(source, tmp_path / "uncased", given)
    told = capsys.readouterr().err
    assert told.startswith(f"{given}: it does not give every text back: 'The QUICK Fox' comes back as 'the quick fox'")
    assert told.count("\n") == 1


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    """A shard of another model has tensors of the same names: the index says whose they are."""
    source = write_reference("flow", tmp_path)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(source / "a.safetensors")
    name = "transformer.norm.weight"
    save_file({name: weights[name] + 1, "transformer.other": weights[name]}, source / "b.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"other": "b.safetensors"}}))
    with pytest.raises(CalmError, match=rf"b.safetensors holds {name}, which {index.name} places in a.safetensors"):
        import_checkpoint(source, tmp_path / "own")
    (source / "b.safetensors").unlink()
    with pytest.raises(CalmError, match=r"b.safetensors is missing or damaged"):
        import_checkpoint(source, tmp_path / "own")


def test_shards_without_their_index(tmp_path: Path) -> None:
    source = write_reference("flow", tmp_path)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    with pytest.raises(CalmError, match=r"holds no weights; one of .* is needed; it has model-00001-of-00002.safeten"):
        import_checkpoint(source, tmp_path / "own")
