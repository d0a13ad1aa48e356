"""The Transformer as a Llama of the transformers library, and back: equal logits, the same weights.

Notable:
- the two are one architecture, but here no projection has a bias and rotary embeddings are not scaled; a Llama
  with anything else is refused, as are its relatives, whose tensors may have the same names;
- a Llama that ties its output matrix to its embedding gets two equal matrices here, which training would part.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.reference.matched import Found, matched
from calm_core.reference.origin import original_types
from calm_core.reference.settings import FIXED, norm_epsilon, number, rope_theta, unbuilt
from calm_core.reference.streamed_weights import write_model_weights
from calm_core.reference.untrusted_weights import Stored
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import POST_PROCESSOR, load_model, read_config
from calm_core.tokens.document_marks import told_kind
from calm_core.tokens.tokenizer import TOKENIZER, end_of_text_id, load_tokenizer
from calm_core.tokens.tokenizer_config import TOKENIZER_CONFIG, prompt_opening, tokenizer_config, with_opening
from calm_core.transformer.model import Transformer, TransformerConfig

ARCHITECTURE = "LlamaForCausalLM"

EMBEDDING, OUTPUT_MATRIX = "model.embed_tokens.weight", "lm_head.weight"

_NAMES = (
    (r"^embedding\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^backbone\.", "model."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.output\.", ".self_attn.o_proj."),
    (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
)
"""Our names -> Llama's, patterns applied in order."""

_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints hold though config.json tells them."""


def export_llama(source: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Write the Transformer in the folder ``source`` as a Llama into ``folder``, which is there and empty.

    ``origin`` is the model's (``read_origin``).
    """
    model, own = load_model(Transformer, source), read_config(source)
    context = own["context_tokens"]
    weights = {_llama_name(name): weight for name, weight in model.state_dict().items()}
    types = original_types(weights, origin, source)
    tokenizer = load_tokenizer(source / TOKENIZER) if (source / TOKENIZER).is_file() else None
    opening = own.get("opening") or () if tokenizer is None else prompt_opening(own, source, tokenizer)
    config = llama_config(model.config, context, opening, tokenizer)
    config["dtype"] = str(types[EMBEDDING]).removeprefix("torch.")
    if (kind := told_kind(own, source / "config.json")) == POST_PROCESSOR:
        # For the way back; transformers keeps what it does not know. A text ends where another document would begin.
        config["document_marks"] = kind
        config["eos_token_id"] = [
            token_id for token_id in (config["eos_token_id"], *opening[:1]) if token_id is not None
        ]
    # What an imported Llama said of its texts, which may be more than its tokenizer tells.
    told = {key: origin["config"][key] for key in ("bos_token_id", "eos_token_id") if key in origin["config"]}
    write_json(folder / "config.json", {**origin["config"], **config, **told})
    write_model_weights(weights, types, folder)
    if tokenizer is not None:
        with_opening(tokenizer, opening).save(str(folder / TOKENIZER))
        write_json(folder / TOKENIZER_CONFIG, tokenizer_config(tokenizer, context, opening))


def is_llama(weights: Collection[str]) -> bool:
    """Whether tensors of the names ``weights`` are those of a Llama or one of its relatives."""
    return EMBEDDING in weights


def match_llama(config: dict[str, Any], weights: Stored, source: str) -> Found:
    """The Transformer that ``weights`` make, in Llama's names; ``config`` is its config.json, which has to agree.

    Raises:
        CalmError: it is no Llama, has what no Transformer here has, lacks tensors or has others.
    """
    wrong = unbuilt(config)
    for key, allowed in (("model_type", ("llama",)), ("architectures", ([ARCHITECTURE],))):
        if config.get(key) is not None and config[key] not in allowed:
            wrong.append(f"{key} is {config[key]!r}, allowed is {allowed[0]!r}")
    sizes = {key: _size(config, key, wrong) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    layers, heads = _size(config, "num_hidden_layers", wrong), _size(config, "num_attention_heads", wrong)
    # Null or absent, as in the oldest checkpoints, it is the number of heads.
    shared = config.get("num_key_value_heads") is not None
    key_value_heads = _size(config, "num_key_value_heads", wrong) if shared else heads
    if config.get("head_dim") not in (None, sizes["hidden_size"] // heads):
        wrong.append(f"head_dim is {config['head_dim']!r}, here it is always hidden_size / num_attention_heads")
    if wrong:
        raise CalmError(f"{source} is refused: config.json: {'; '.join(wrong)}")
    try:
        shape = TransformerConfig(
            sizes["vocab_size"],
            BackboneConfig(
                sizes["hidden_size"],
                sizes["intermediate_size"],
                layers,
                heads,
                key_value_heads,
                rope_theta(config, source),
                norm_epsilon(config, source),
            ),
        )
    except ValueError as error:  # heads that do not share the features evenly
        raise CalmError(f"{source} is refused: config.json: {error}") from None
    # Before a model of the sizes that a file merely claims is built.
    if f"model.layers.{layers}.input_layernorm.weight" in weights or len(weights) < layers:
        raise CalmError(f"{source} is refused: num_hidden_layers is {layers}, the weights have another number")
    embedding, claimed = list(weights[EMBEDDING].shape), [sizes["vocab_size"], sizes["hidden_size"]]
    if embedding != claimed:
        raise CalmError(f"{source} is refused: wrong shapes: {EMBEDDING} {embedding} instead of {claimed}")
    return matched(Transformer, shape, llama_names, llama_weights(config, weights), (), source)


def llama_context(config: dict[str, Any], source: str) -> int:
    """The context in tokens; CalmError where ``config`` has no positive number for it."""
    return max(1, int(number(config, "max_position_embeddings", 2048, source)))


def llama_weights(config: dict[str, Any], weights: Stored) -> Stored:
    """Those of ``weights`` that count, with the output matrix, which is the embedding where ``config`` ties the two."""
    given = {name: weight for name, weight in weights.items() if not _DERIVED.fullmatch(name)}
    if config.get("tie_word_embeddings") is True:
        # Whether the file repeats it or not: it is what such a Llama computes with.
        given[OUTPUT_MATRIX] = given[EMBEDDING]
    return given


def llama_names(model: nn.Module) -> dict[str, list[str]]:
    """A Transformer's names of its tensors -> Llama's, of which each has one."""
    return {name: [_llama_name(name)] for name in model.state_dict()}


def _llama_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def llama_config(
    shape: TransformerConfig, context: int | None, opening: Sequence[int] = (), tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """The config.json of the Llama that a Transformer of ``shape`` is, with what its folder tells beside the shape."""
    backbone = shape.backbone
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": shape.vocabulary_size,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "num_hidden_layers": backbone.layers,
        "num_attention_heads": backbone.heads,
        "num_key_value_heads": backbone.key_value_heads,
        "head_dim": backbone.hidden_size // backbone.heads,
        "max_position_embeddings": context or 2048,
        # Where version 4 of transformers reads it and version 5 reads it too.
        "rope_theta": backbone.rope_theta,
        **FIXED,
        "rms_norm_eps": backbone.norm_epsilon,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        # Llama's defaults are ids 1 and 2, whatever those are here: null says that there is none.
        "bos_token_id": opening[0] if len(opening) == 1 else None,
        "eos_token_id": None if tokenizer is None else end_of_text_id(tokenizer),
    }


def _size(config: dict[str, Any], key: str, wrong: list[str]) -> int:
    value = config.get(key)
    if type(value) is int and 0 < value < 1 << 32:
        return value
    wrong.append(f"{key} is {value!r}, a positive whole number is needed")
    return 1
