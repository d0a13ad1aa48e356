"""config.json's settings that change what a model computes, though no tensor tells: read right, or refused.

Notable:
- transformers 5 writes the rotary base as ``rope_parameters: {rope_theta, rope_type}``, earlier versions as
  ``rope_theta`` beside ``rope_scaling``; an absent base is the architecture's default;
- of what Llama's relatives add, only the values that leave Llama as it is are taken.
"""

from typing import Any

from calm_core.errors import CalmError
from calm_core.nn.layers import NORM_EPSILON

ROPE_THETA = 10_000.0
"""The rotary base where config.json names none, as in the reference implementation and in Llama."""

FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "rms_norm_eps": NORM_EPSILON,
    "rope_scaling": None,
}
"""Settings of config.json that models here have no choice in, as export writes them; epsilon is a backbone's own."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "hidden_activation": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
    "use_bidirectional_attention": (False,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "clip_qkv": (),
    "quantization_config": (),
}
"""Values that a key may have where it is there and not null; the first is the one that messages name."""

_NESTED = ("text_config", "llm_config", "language_config")


def unbuilt(config: dict[str, Any]) -> list[str]:
    """What config.json asks for that no model here does, each with what is allowed."""
    told = [
        f"{key} is {config[key]!r}, here it is always {next(iter(values), None)!r}"
        for key, values in _ALLOWED.items()
        if config.get(key) is not None and config[key] not in values
    ]
    for key in ("rope_scaling", "rope_parameters"):
        told += _unbuilt_rope(key, config.get(key))
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 2048)
    # A window as long as the context is none.
    whole = window is None or (isinstance(window, int) and isinstance(context, int) and window >= context)
    if not whole and config.get("use_sliding_window") is not False:
        told.append(f"sliding_window is {window!r}, here it is always None")
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        told.append(f"layer_types is {layers!r}, here it is always 'full_attention', for each layer")
    unrotated = config.get("no_rope_layers")  # 0 for a layer without
    if unrotated and (not isinstance(unrotated, list) or not all(unrotated)):
        told.append(f"no_rope_layers is {unrotated!r}, here it is always None")
    told += [
        f"{key} holds settings of its own, which have to stand at the top level"
        for key in _NESTED
        if isinstance(config.get(key), dict)
    ]
    return told


def rope_theta(config: dict[str, Any], source: str) -> float:
    """The rotary base; raises CalmError where it is no positive number, or given twice and different."""
    found: dict[str, float] = {}
    if config.get("rope_theta") is not None:
        found["rope_theta"] = number(config, "rope_theta", ROPE_THETA, source)
    for key in ("rope_parameters", "rope_scaling"):
        inner = config.get(key)
        if isinstance(inner, dict) and inner.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = number(inner, "rope_theta", ROPE_THETA, source, f"{key}.")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{key} is {value:g}" for key, value in found.items())
        raise CalmError(f"{source} is refused: config.json: {told}; they have to be the same")
    return next(iter(found.values()), ROPE_THETA)


def norm_epsilon(config: dict[str, Any], source: str) -> float:
    """The epsilon of the backbone's norms, 1e-6 where none is named; errors as of ``number``."""
    return number(config, "rms_norm_eps", NORM_EPSILON, source)


def number(config: dict[str, Any], key: str, default: float, source: str, inside: str = "") -> float:
    """The positive number ``key`` of ``config``, ``default`` where it is absent or null; else CalmError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CalmError(f"{source} is refused: config.json: {inside}{key} is {value!r}, a positive number is needed")
    return float(value)


def _unbuilt_rope(key: str, rope: Any) -> list[str]:
    if rope is None or rope == {}:
        return []
    if not isinstance(rope, dict):
        return [f"{key} is {rope!r}, here it is always None or of rope_type 'default'"]
    # Earlier versions called it type; rope_parameters may leave it out.
    kind = rope.get("rope_type", rope.get("type", "default" if key == "rope_parameters" else None))
    wrong = [] if kind == "default" else [f"{key} is {rope!r}, here it is always None or of rope_type 'default'"]
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        wrong.append(f"{key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, here it is always 1.0")
    if any(isinstance(value, dict) for value in rope.values()):
        wrong.append(f"{key} is {rope!r}, here it is always one for all layers")
    return wrong
