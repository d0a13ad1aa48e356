"""What the reference implementation calls our weights.

One table of patterns from our names to theirs serves both directions: a name is translated once, for a model that
exists, and an importer looks the translations up. Layers that we keep in two lists stand in one of theirs.
"""

import re

from torch import nn

from calm_core.autoencoder import Autoencoder
from calm_core.calm import Calm

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

OUTPUT_MATRIX = "decoder.lm_head_weight"
"""The second name of the autoencoder's embedding."""

AUTOENCODER_PREFIX = "ae_model."
"""Before the names of the frozen autoencoder in a language model's file."""


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
        if found := re.match(rf"{re.escape(ours)}\.(\d+)", name):
            side = ours.split(".")[0]
            name = f"{side}.{side}_layers.{int(found[1]) + offset}{name[found.end() :]}"
    theirs = _translate(name, _AUTOENCODER)
    return [theirs, OUTPUT_MATRIX] if theirs == "encoder.embed_tokens.weight" else [theirs]


def _translate(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
