"""Text from a trained model, a key/value cache behind it: one patch a step for CALM, one token for the Transformer."""

import torch
from torch import Tensor

from calm_core.autoencoder import Autoencoder
from calm_core.calm import Calm
from calm_core.continuations import sample_tokens
from calm_core.temperature import temperature_choice
from calm_core.transformer import Transformer

TEMPERATURE_DRAWS = 200
"""Samples a patch that CALM chooses from below temperature 1 (the paper's number)."""


@torch.no_grad()
def generate_with_calm(
    model: Calm, autoencoder: Autoencoder, prompt: Tensor, tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Continue ``prompt`` [batch, whole patches * K] by ``tokens`` token ids, [batch, tokens]."""
    patch_size = model.config.patch_size
    cache = model.backbone.new_cache()
    patches = prompt.unflatten(-1, (-1, patch_size))
    generated: list[Tensor] = []
    while len(generated) * patch_size < tokens:
        hidden_states = model(patches, cache)[:, -1]
        draws = 1 if temperature == 1 else TEMPERATURE_DRAWS
        noise = model.head.draw((draws, len(hidden_states)), generator)
        candidates = autoencoder.decode(model.head(hidden_states, noise))
        chosen = candidates[0] if temperature == 1 else temperature_choice(candidates, temperature, generator)
        generated.append(chosen)
        patches = chosen[:, None]
    return torch.cat(generated, dim=-1)[:, :tokens]


@torch.no_grad()
def generate_with_transformer(
    model: Transformer, prompt: Tensor, tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Continue ``prompt`` [batch, length] by ``tokens`` token ids, [batch, tokens], from P^(1 / temperature)."""
    cache = model.backbone.new_cache()
    token_ids = prompt
    generated: list[Tensor] = []
    for _ in range(tokens):
        log_probabilities = (model(token_ids, cache)[:, -1].float() / temperature).log_softmax(dim=-1)
        token_ids = sample_tokens(log_probabilities, generator)[:, None]
        generated.append(token_ids)
    return torch.cat(generated, dim=-1)
