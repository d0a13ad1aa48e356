"""Small random models: a CALM (K = 3) and a Transformer in folders, as `dvc repro` leaves large ones, or any other."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.tokens.tokenizer import train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
TEXT = "the quick brown fox, jumps; über the łazy dog. "
VOCABULARY, PATCH_SIZE = 270, 3


def few_words() -> Tokenizer:
    """A tokenizer of 260 entries."""
    return train_tokenizer(["a few words, a few more"], 260)


def weighted(model: Any, seed: int) -> Any:
    """``model`` with weights that all matter, unlike those that a training starts from."""
    initialise(model, torch.Generator().manual_seed(seed), embedding_std=1.0)
    return model.eval().requires_grad_(False)


def write_models(folder: Path, backbone: BackboneConfig = BACKBONE, context_tokens: int = 24) -> None:
    """Write ``folder``/calm, with an autoencoder half as wide in its latents as ``backbone``, and /transformer."""
    tokenizer, hidden_size = train_tokenizer([TEXT], VOCABULARY), backbone.hidden_size
    latent_size = hidden_size // 2
    autoencoder = Autoencoder(
        AutoencoderConfig(VOCABULARY, PATCH_SIZE, hidden_size, backbone.intermediate_size, latent_size)
    )
    calm = Calm(CalmConfig(VOCABULARY, PATCH_SIZE, latent_size, backbone, EnergyHeadConfig(1, latent_size)))
    transformer = Transformer(TransformerConfig(VOCABULARY, backbone))
    for model in (autoencoder, calm, transformer):
        model.initialise(torch.Generator().manual_seed(0))
    save_model(calm, tokenizer, folder / "calm", context_tokens)
    save_model(autoencoder, tokenizer, folder / "calm" / AUTOENCODER)
    save_model(transformer, tokenizer, folder / "transformer", context_tokens)
