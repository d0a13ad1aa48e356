"""The trainings at a size that takes milliseconds, on a token stream and latents that lie on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.autoencoder.training import AutoencoderObjective
from calm_core.calm.token_training import TokenHeadObjective
from calm_core.calm.training import CalmObjective, calm_config
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus
from calm_core.params import AutoencoderParams, CalmParams, Params, TransformerParams
from calm_core.tokens.shards import TokenStream, TokenWriter
from calm_core.training.objective import Objective
from calm_core.transformer.training import TransformerObjective

VOCABULARY, LATENT, CONTEXT = 50, 6, 8

BACKBONE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "layers": 1,
    "heads": 2,
    "key_value_heads": 1,
    "context_tokens": CONTEXT,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keep_float32_in_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's own Muon do without the rounding to bfloat16 on its way."""
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rounds = options.get("dtype") is torch.bfloat16
        return tensor.clone() if rounds else original(tensor, *arguments, **options)

    # The one is how torch 2.13 rounds there, the other how 2.15 does.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "to", to)


def stream_of(folder: Path, token_ids: torch.Tensor, vocabulary: int = VOCABULARY) -> TokenStream:
    """A split of ``token_ids``, in documents of 13 tokens and shards of 39."""
    writer = TokenWriter(folder, "train", vocabulary)
    for number, document in enumerate(token_ids.split(13)):
        writer.write(document.tolist())
        if number % 3 == 2:
            writer.flush()
    writer.flush()
    return TokenStream(folder, "train")


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=seeded(seed))


def tiny_autoencoder(patch_size: int) -> Autoencoder:
    model = Autoencoder(AutoencoderConfig(VOCABULARY, patch_size, 12, 16, LATENT))
    model.initialise(seeded(1))
    return model.eval().requires_grad_(False)


def encoded(folder: Path, tokens: TokenStream, autoencoder: Autoencoder) -> LatentCorpus:
    encode_corpus(autoencoder, tokens, folder, "float32")
    return LatentCorpus(folder)


def autoencoder_section(params: Params, **changes: Any) -> AutoencoderParams:
    sizes = {"patch_size": 2, "hidden_size": 12, "intermediate_size": 16, "latent_size": LATENT, "batch_patches": 6}
    return params.autoencoder.model_copy(update={**sizes, **changes})


def calm_section(params: Params, **changes: Any) -> CalmParams:
    """Of an energy head, unless ``changes`` ask for another."""
    sizes = {**BACKBONE, "batch_sequences": 4, "head": "energy", "head_blocks": 1, "noise_size": 5}
    sizes |= {"diffusion_steps": 20, "token_hidden_size": 12, "token_intermediate_size": 20, "token_layers": 2}
    return params.calm.model_copy(update={**sizes, **changes})


def transformer_section(params: Params, **changes: Any) -> TransformerParams:
    return params.transformer.model_copy(update={**BACKBONE, "batch_sequences": 4, **changes})


Build = Callable[[Params, Path, int], Objective[Any, Any]]
"""An objective of the given params and seed, whose corpus is written to a folder."""


def build_autoencoder(params: Params, folder: Path, seed: int) -> Objective[Any, Any]:
    return AutoencoderObjective(autoencoder_section(params), stream_of(folder, random_tokens(90)), VOCABULARY, seed)


def build_transformer(params: Params, folder: Path, seed: int) -> Objective[Any, Any]:
    return TransformerObjective(transformer_section(params), stream_of(folder, random_tokens(90)), VOCABULARY, seed)


def build_calm(params: Params, folder: Path, seed: int, **changes: Any) -> Objective[Any, Any]:
    autoencoder, tokens = tiny_autoencoder(2), stream_of(folder, random_tokens(90))
    section = calm_section(params, **changes)
    return CalmObjective(section, tokens, encoded(folder, tokens, autoencoder), autoencoder, seed)


def build_calm_of_latents(params: Params, folder: Path, seed: int) -> Objective[Any, Any]:
    return build_calm(params, folder, seed, input="latents", head="diffusion")


def build_calm_of_tokens(params: Params, folder: Path, seed: int) -> Objective[Any, Any]:
    section, coder = calm_section(params, head="tokens"), tiny_autoencoder(2).config
    tokens = stream_of(folder, random_tokens(90))
    return TokenHeadObjective(section, calm_config(section, coder), tokens, seed, "train_calm")


BUILDS: dict[str, Build] = {
    "autoencoder": build_autoencoder,
    "transformer": build_transformer,
    "calm": build_calm,
    "calm of latents": build_calm_of_latents,
    "calm of tokens": build_calm_of_tokens,
}
