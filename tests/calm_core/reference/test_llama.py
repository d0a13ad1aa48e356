"""The Transformer as transformers' own Llama: its logits, its tokenizer, the way back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from calm_core.inference.language_model import load_language_model
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.reference.llama import match_llama
from calm_core.reference.untrusted_weights import StoredTensor
from calm_core.storage.model_folder import count_parameters, load_model, read_config, save_model
from calm_core.tokens.document_marks import DocumentMarks
from calm_core.tokens.tokenizer import end_of_text_id, train_tokenizer
from calm_core.tokens.tokenizer_config import opening_of
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.reference.reference_data import refusal
from tests.calm_core.tokens import published

SHAPE = BackboneConfig(32, 48, 3, 4, 2, 500.0, 0.01)
TEXTS = ["The name of the bucket.", "über <eos> łąka\n\n  two  spaces ."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the name of the bucket that holds the object, and its owner"], 280)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with our Transformer in ``own`` and the Llama of it in ``llama``."""
    folder = tmp_path_factory.mktemp("llama")
    model = Transformer(TransformerConfig(280, SHAPE))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    save_model(model, tokenizer, folder / "own", 64, [end_of_text_id(tokenizer)])
    export_checkpoint(folder / "own", folder / "llama")
    return folder


def token_ids(rows: int = 2, length: int = 64) -> torch.Tensor:
    return torch.randint(280, (rows, length), generator=torch.Generator().manual_seed(1))


def llama(folder: Path, **changes: Any) -> LlamaConfig:
    """A random Llama that transformers itself saves into ``folder``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 4, "rms_norm_eps": 1e-6, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    return config


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_transformers_computes_the_same_logits(exported: Path) -> None:
    ours, theirs = load_model(Transformer, exported / "own"), LlamaForCausalLM.from_pretrained(exported / "llama")
    with torch.no_grad():
        torch.testing.assert_close(ours(token_ids()), theirs(token_ids()).logits, atol=1e-5, rtol=1e-5)
    assert theirs.dtype == torch.float32
    found = type(AutoModelForCausalLM.from_pretrained(exported / "llama"))
    assert found is LlamaForCausalLM


def test_transformers_reads_the_tokenizer(exported: Path) -> None:
    ours, theirs = load_language_model(exported / "own"), AutoTokenizer.from_pretrained(exported / "llama")
    end_of_text = end_of_text_id(ours.tokenizer)
    for text in TEXTS:
        assert theirs(text).input_ids == [end_of_text, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (end_of_text, end_of_text, 0)
    assert theirs.model_max_length == 64


def test_transformers_writes_the_same_text(exported: Path) -> None:
    ours = load_language_model(exported / "own")
    theirs = LlamaForCausalLM.from_pretrained(exported / "llama")
    inputs = AutoTokenizer.from_pretrained(exported / "llama")("The name", return_tensors="pt")
    likeliest = theirs.generate(**inputs, do_sample=False, max_new_tokens=9)[0, inputs.input_ids.shape[1] :]
    assert ours.generate(["The name"], tokens=9, temperature=1e-4) == [ours.decode(likeliest.tolist())]
    assert GenerationConfig.from_model_config(theirs.config).eos_token_id == end_of_text_id(ours.tokenizer)


def test_there_and_back(exported: Path, tmp_path: Path) -> None:
    assert import_checkpoint(exported / "llama", tmp_path / "again") == "Transformer, from a Llama"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / "own" / name).read_bytes()
    export_checkpoint(tmp_path / "again", tmp_path / "back")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (exported / "llama" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        # The epsilon of Llama 2 and 3; the embeddings of transformers are so small that it shows.
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 300.0}, "rms_norm_eps": 1e-5},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_a_llama_of_transformers_comes_and_goes(dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path) -> None:
    llama(tmp_path / "llama", **changes)
    LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=dtype).save_pretrained(tmp_path / "typed")
    import_checkpoint(tmp_path / "typed", tmp_path / "own")
    ours = load_model(Transformer, tmp_path / "own")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "typed", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(token_ids()), theirs(token_ids()).logits, atol=1e-5, rtol=1e-5)
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    came, went = (load_file(tmp_path / name / "model.safetensors") for name in ("typed", "back"))
    assert came.keys() == went.keys()
    assert all(torch.equal(came[name], went[name]) and went[name].dtype == dtype for name in came)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert again.dtype == dtype
    assert again.config.rms_norm_eps == theirs.config.rms_norm_eps


def test_shards_ties_and_old_buffers(tmp_path: Path) -> None:
    llama(tmp_path / "llama", tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    import_checkpoint(tmp_path / "shards", tmp_path / "own")
    ours = load_model(Transformer, tmp_path / "own")
    assert torch.equal(ours.output.weight, ours.embedding.weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(token_ids()), model(token_ids()).logits, atol=1e-5, rtol=1e-5)
    weights = load_file(tmp_path / "llama/model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "llama/model.safetensors")
    import_checkpoint(tmp_path / "llama", tmp_path / "old")
    assert torch.equal(load_model(Transformer, tmp_path / "old").output.weight, ours.output.weight)


PUBLISHED = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "head_dim": 64, "rope_theta": 100000,
        "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
    },
    "TinyLlama-1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1,
    },
}  # fmt: skip
"""Settings of small Llamas that people know; their norms' epsilon is 1e-5."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    """By names and shapes alone, as transformers has them."""
    settings = {**PUBLISHED[name], "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False}
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**settings))
    stored = {
        name: StoredTensor(Path("model.safetensors"), torch.bfloat16, tuple(weight.shape), 0)
        for name, weight in theirs.state_dict().items()
    }
    found = match_llama({**settings, "model_type": "llama"}, stored, name)
    backbone = found.model.config.backbone
    assert (backbone.norm_epsilon, backbone.rope_theta) == (1e-5, settings["rope_theta"])
    # transformers counts the matrix of a tied model once.
    tied = settings["vocab_size"] * settings["hidden_size"] if settings.get("tie_word_embeddings") else 0
    assert count_parameters(found.model) == sum(weight.numel() for weight in theirs.parameters()) + tied


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'default'"),
        ({"attention_bias": True}, "attention_bias is True, here it is always False"),
        ({"mlp_bias": True}, "mlp_bias is True, here it is always False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', here it is always 'silu'"),
        ({"head_dim": 16}, "head_dim is 16, here it is always hidden_size / num_attention_heads"),
    ],
)
def test_a_llama_with_what_is_not_built_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    llama(tmp_path / "llama", **changes)
    assert told in refusal(tmp_path / "llama", tmp_path / "own")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', allowed is 'llama'"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures is ['MistralForCausalLM']"),
        ({"vocab_size": 281}, "wrong shapes: model.embed_tokens.weight [280, 32] instead of [281, 32]"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, the weights have another number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, "),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_attention_heads": None}, "num_attention_heads is None, a positive whole number is needed"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads is '4', a positive whole number is needed"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, a positive number is needed"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1, a positive number is needed"),
    ],
)
def test_a_config_that_the_weights_contradict_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    edit(tmp_path / "llama", **changes)
    assert told in refusal(tmp_path / "llama", tmp_path / "own")


def test_tensors_too_many_or_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    file = tmp_path / "llama/model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)
    assert "has unknown model.layers.0.self_attn.q_proj.bias" in refusal(tmp_path / "llama", tmp_path / "own")
    save_file({**weights, "lm_head.weight": torch.zeros(280, 32, dtype=torch.int8)}, file)
    assert "neither of" in refusal(tmp_path / "llama", tmp_path / "own")


def test_documents_marked_by_the_tokenizers_own_template_stay_so(tmp_path: Path) -> None:
    """A text ends there where another document would begin, and the way back gives the same folder."""
    tokenizer = published.PUBLISHED["llama-3"]()
    begin, end = (tokenizer.token_to_id(name) for name in ("<|begin_of_text|>", "<|end_of_text|>"))
    model = Transformer(TransformerConfig(tokenizer.get_vocab_size(), SHAPE))
    initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    save_model(model, tokenizer, tmp_path / "own", 64, document_marks="post_processor")
    export_checkpoint(tmp_path / "own", tmp_path / "llama")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert GenerationConfig.from_model_config(theirs.config).eos_token_id == [end, begin]
    assert theirs.config.bos_token_id == begin
    import_checkpoint(tmp_path / "llama", tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "own/config.json").read_bytes()
    ours, again = (load_language_model(tmp_path / name) for name in ("own", "again"))
    assert again.document_marks == ours.document_marks == DocumentMarks(before=(begin,))


def test_what_a_llama_says_of_the_ends_of_its_texts_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    llama(tmp_path / "llama", bos_token_id=7, eos_token_id=[5, 9])
    tokenizer.save(str(tmp_path / "llama/tokenizer.json"))
    import_checkpoint(tmp_path / "llama", tmp_path / "own")
    export_checkpoint(tmp_path / "own", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, [5, 9])


def test_what_stands_before_a_text_is_kept(exported: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    llama(tmp_path / "llama")
    template = Tokenizer.from_str(tokenizer.to_str())
    template.save(str(tmp_path / "llama/tokenizer.json"))
    import_checkpoint(tmp_path / "llama", tmp_path / "without")
    assert read_config(tmp_path / "without")["opening"] is None
    words = Tokenizer(models.WordLevel({"the": 0, "<s>": 1}))  # which has no token for any other text
    words.post_processor = TemplateProcessing(["<s>", "$A"], special_tokens=[("<s>", 1)])
    assert opening_of(words) is None
    template.post_processor = TemplateProcessing(["<pad>", "$A"], special_tokens=[("<pad>", 0)])
    template.save(str(tmp_path / "llama/tokenizer.json"))
    import_checkpoint(tmp_path / "llama", tmp_path / "with")
    assert read_config(tmp_path / "with")["opening"] == [0]
