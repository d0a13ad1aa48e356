"""Reconstruction accuracy of autoencoders in closed form, for which it is known with and without latent noise."""

import math
from pathlib import Path

import pytest
import torch

from calm_core.autoencoder import training
from calm_core.autoencoder.training import Reconstruction, reconstruction
from calm_core.tokens.shards import TokenStream
from tests.calm_core.known_models import Text, code_autoencoder

SIGNS = torch.tensor([[1.0], [-1.0]])
"""Two tokens, one number each: decoded wrongly where noise turns its sign."""

AXES = torch.eye(2)
"""Two tokens, two numbers each: decoded wrongly where noise turns the order of the numbers."""

TOKENS = 40_000


def random_stream(folder: Path, tokens: int, size: int = 2) -> TokenStream:
    token_ids = torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    Text([token_ids[: tokens // 3], token_ids[tokens // 3 :]]).write(folder, "validation", size, 1)
    return TokenStream(folder, "validation")


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize("margin", [0.15, 0.3, 0.6])
@pytest.mark.parametrize(("codes", "posterior_std"), [(SIGNS, 0.05), (AXES, 1.5)])
def test_noise_has_std_three_tenths(
    tmp_path: Path, patch_size: int, margin: float, codes: torch.Tensor, posterior_std: float
) -> None:
    # The mean lies ``margin`` from where decoding changes. The width of the posterior itself is not what is added.
    scale = margin * codes.shape[1] ** 0.5
    model = code_autoencoder(codes, patch_size, scale, math.log(posterior_std))
    found = reconstruction(model, random_stream(tmp_path, TOKENS), seed=1)
    exact = normal_cdf(margin / 0.3)
    assert found.token_accuracy == 1
    assert abs(found.token_accuracy_noisy - exact) < 4 * math.sqrt(exact * (1 - exact) / TOKENS)
    assert found.posterior_std == pytest.approx(posterior_std, rel=1e-5)
    assert found.tokens == TOKENS


def test_tokens_that_share_a_code_are_lost(tmp_path: Path) -> None:
    # Token 2 decodes to token 1, token 3 to token 0, far from any noise.
    tokens = random_stream(tmp_path, 1001, size=4)
    model = code_autoencoder(torch.cat([SIGNS, SIGNS.flip(0)]), 2, scale=10.0)
    # Of an odd number of tokens the last one fills no patch.
    exact = float((tokens.slice(0, 1000) < 2).double().mean())
    assert 0.4 < exact < 0.6
    assert reconstruction(model, tokens, seed=0) == Reconstruction(exact, exact, pytest.approx(1.0), 1000)


def test_every_patch_has_noise_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two patches of two tokens a batch: were the noise drawn anew from its seed, few accuracies would be possible.
    monkeypatch.setattr(training, "EVALUATION_BATCH", 2)
    count, exact = 4000, normal_cdf(1)
    found = reconstruction(code_autoencoder(SIGNS, 2, 0.3), random_stream(tmp_path, count), seed=2)
    assert abs(found.token_accuracy_noisy - exact) < 4 * math.sqrt(exact * (1 - exact) / count)
    other = reconstruction(code_autoencoder(SIGNS, 2, 0.3), TokenStream(tmp_path, "validation"), seed=3)
    assert other.token_accuracy_noisy != found.token_accuracy_noisy


def test_a_long_split_is_looked_at_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = code_autoencoder(SIGNS, 4, 1.0, -20.0)
    first = reconstruction(model, random_stream(tmp_path, 10), seed=0)
    assert first.tokens == 8
    monkeypatch.setattr(training, "MEASURED_TOKENS", 7)
    limited = reconstruction(model, TokenStream(tmp_path, "validation"), seed=0)
    assert limited.tokens == 4
