"""What the reference implementation calls our weights and our sizes.

One table of patterns from our names to theirs serves both directions: export translates the names of a model, and
import builds the model first and looks up the translations. Layers that we keep in two lists are in one of theirs.
"""

import re
from typing import Any

import torch
from torch import nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig

DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_AUTOENCODER = (
    (r"^encoder\.embedding", "encoder.embed_tokens"),
    (r"^encoder\.token_layers", "encoder.encoder_layers"),
    (r"^decoder\.patch_layers", "decoder.decoder_layers"),
    (r"_layers\.(\d+)\.norm", r"_layers.\1.layernorm"),
    (r"\.(gate|up|down)\.", r".\1_proj."),
    (r"\.(squeeze|expand)\.", r".\1_layer."),
    (r"\.to_posterior\.", ".hidden_to_latent."),
    (r"\.from_latent\.", ".latent_to_hidden."),
)

_BACKBONE = (
    (r"^patch_embedding\.embedding", "transformer.embed_tokens"),
    (r"^patch_embedding\.projection", "embed_proj"),
    (r"^backbone\.", "transformer."),
    (r"\.attention_norm", ".input_layernorm"),
    (r"\.mlp_norm", ".post_attention_layernorm"),
    (r"\.attention\.query", ".self_attn.q_proj"),
    (r"\.attention\.key", ".self_attn.k_proj"),
    (r"\.attention\.value", ".self_attn.v_proj"),
    (r"\.attention\.output", ".self_attn.o_proj"),
    (r"^(transformer.*\.mlp)\.(gate|up|down)\.", r"\1.\2_proj."),
)

_ENERGY_HEAD = (
    (r"^head\.blocks\.(\d+)\.norm", r"generative_head.mlp_blocks.\1.in_ln"),
    (r"^head\.blocks\.(\d+)\.mlp", r"generative_head.mlp_blocks.\1.linears"),
    (r"^head\.blocks\.(\d+)\.down", r"generative_head.mlp_blocks.\1.down_proj"),
    (r"^head\.norm", "generative_head.final_layer.in_ln"),
    (r"^head\.output", "generative_head.final_layer.linears"),
    (r"^head\.noise_projection", "generative_head.noise_embd"),
    (r"^head\.noise_norm", "generative_head.norm_noise"),
    (r"^head\.condition_projection", "generative_head.hidden_embd"),
    (r"^head\.condition_norm", "generative_head.norm_hidden"),
)

_DENOISER = (
    (r"^head\.denoiser\.", "generative_head.net."),
    (r"net\.time_projection", "net.time_embed.mlp"),
    (r"net\.condition_projection", "net.cond_embed"),
    (r"net\.input_projection", "net.input_proj"),
    (r"net\.blocks\.(\d+)\.norm", r"net.res_blocks.\1.in_ln"),
    (r"net\.blocks\.(\d+)\.modulation", r"net.res_blocks.\1.adaLN_modulation"),
    (r"net\.blocks\.(\d+)\.mlp", r"net.res_blocks.\1.mlp"),
    (r"net\.modulation", "net.final_layer.adaLN_modulation"),
    (r"net\.output", "net.final_layer.linear"),
)

EMBEDDING, OUTPUT_MATRIX = "encoder.embed_tokens.weight", "decoder.lm_head_weight"
"""The two names of the autoencoder's embedding."""

AUTOENCODER_PREFIX = "ae_model."
"""Before the names of the frozen autoencoder in a language model's file."""

LANGUAGE_MODEL_PREFIXES = ("transformer.", "embed_proj.", "generative_head.", "mlp_generator.")
"""What names of a language model's own tensors begin with."""


def reference_names(model: nn.Module) -> dict[str, list[str]]:
    """Our weights' names -> theirs, of an Autoencoder or a Calm; the first counts, the others hold the same tensor.

    They keep the autoencoder's embedding also as the decoder's output matrix, and the energy head twice.
    """
    if isinstance(model, Autoencoder):
        return {name: _autoencoder_names(name, model) for name in model.state_dict()}
    assert isinstance(model, Calm)
    rules = _BACKBONE + (_ENERGY_HEAD if model.config.head.kind == "energy" else _DENOISER)
    names = {name: [_translate(name, rules)] for name in model.state_dict()}
    if model.config.head.kind == "energy":
        for theirs in names.values():
            if theirs[0].startswith("generative_head."):
                theirs.append(theirs[0].replace("generative_head.", "mlp_generator."))
    return names


def _autoencoder_names(name: str, model: Autoencoder) -> list[str]:
    config = model.config
    second = {"encoder.patch_layers": config.encoder_layers // 2, "decoder.token_layers": config.decoder_layers // 2}
    for ours, offset in second.items():
        # The second list of ours continues the numbering of the first.
        if found := re.match(rf"{re.escape(ours)}\.(\d+)", name):
            side = ours.split(".")[0]
            name = f"{side}.{side}_layers.{int(found[1]) + offset}{name[found.end() :]}"
    theirs = _translate(name, _AUTOENCODER)
    # Tied here, two names there.
    return [theirs, OUTPUT_MATRIX] if theirs == EMBEDDING else [theirs]


def _translate(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    # In order, each on what the ones before it made: the table's later patterns rely on that.
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def autoencoder_keys(shape: AutoencoderConfig) -> dict[str, Any]:
    """``shape`` as the reference's config.json tells it."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "latent_size": shape.latent_size,
        "num_decoder_layers": shape.decoder_layers,
        "num_encoder_layers": shape.encoder_layers,
        "patch_size": shape.patch_size,
        "vocab_size": shape.vocabulary_size,
    }


def calm_keys(shape: CalmConfig) -> dict[str, Any]:
    """``shape`` as the reference's config.json tells it."""
    backbone, head = shape.backbone, shape.head
    assert not isinstance(head, TokenHeadConfig)
    return {
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "latent_size": shape.latent_size,
        "num_attention_heads": backbone.heads,
        "num_hidden_layers": backbone.layers,
        "num_key_value_heads": backbone.key_value_heads,
        "num_mlp_layers": head.blocks,
        "patch_size": shape.patch_size,
        "rms_norm_eps": backbone.norm_epsilon,
        "rope_theta": backbone.rope_theta,
        "vocab_size": shape.vocabulary_size,
        **({"noise_size": head.noise_size} if isinstance(head, EnergyHeadConfig) else {}),
    }
