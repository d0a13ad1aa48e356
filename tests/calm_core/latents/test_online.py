"""Latents computed in the step against those that were encoded before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from calm_core.calm.training import CalmObjective
from calm_core.latents.online import OnlineLatents
from calm_core.nn.layers import initialise
from calm_core.params import Params
from tests.calm_core.training.tiny_trainings import (
    calm_section,
    encoded,
    random_tokens,
    seeded,
    stream_of,
    tiny_autoencoder,
)


def test_posteriors_are_those_of_the_encoder(tmp_path: Path) -> None:
    token_ids, autoencoder = random_tokens(91), tiny_autoencoder(2)
    latents = OnlineLatents(stream_of(tmp_path, token_ids), autoencoder, "float32")
    assert len(latents) == 45
    positions = torch.tensor([[0, 44, 7], [7, 20, 1]])
    expected = autoencoder.encode(token_ids[:90].view(45, 2)[positions])
    for found, of_encoder in zip(latents.posterior(positions), expected, strict=True):
        torch.testing.assert_close(found, of_encoder)
        assert not found.requires_grad


@pytest.mark.parametrize("inputs", ["tokens", "latents"])
@pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
def test_loss_and_gradients_are_those_of_encoded_latents(
    head: str, inputs: str, params: Params, tmp_path: Path
) -> None:
    autoencoder, tokens = tiny_autoencoder(2), stream_of(tmp_path, random_tokens(90))
    section = calm_section(params, head=head, input=inputs)
    results: list[Any] = []
    for latents in (encoded(tmp_path, tokens, autoencoder), OnlineLatents(tokens, autoencoder, "float32")):
        objective = CalmObjective(section, tokens, latents, autoencoder, 0)
        initialise(objective.model, seeded(1), embedding_std=1.0)
        loss = objective.loss(objective.batch(3, range(4))).total
        results.append((loss, torch.autograd.grad(loss, list(objective.model.parameters()))))
    (of_encoded, gradients), (online, of_online) = results
    # Encoded latents are stored in float16.
    torch.testing.assert_close(online, of_encoded, rtol=1e-3, atol=1e-3)
    for found, expected in zip(of_online, gradients, strict=True):
        assert float((found - expected).norm()) <= 0.02 * float(expected.norm()) + 1e-6
