"""Likelihoods of models whose distribution is known: exact ones, and bounds that have the expectation they must."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.evaluation.likelihood import (
    SAMPLES,
    TEMPERATURES,
    Surprise,
    best_temperature,
    bound,
    calm_surprise,
    likelihood,
    likelihood_blocks,
    log_probabilities,
    scored_bytes,
    token_head_surprise,
    transformer_surprise,
)
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from tests.calm_core.known_models import (
    COIN,
    Text,
    bigram_calm,
    bigram_transformer,
    chain_text,
    coin_calm,
    history_transformer,
    places,
)

SIZE, CONTEXT = 4, 12
TABLE = np.array([[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.1], [0.2, 0.3, 0.1, 0.4], [0.45, 0.05, 0.45, 0.05]])
TEXT = chain_text(TABLE, [5, 1, 23, 2, 40, 7, 12, 3, 61, 1, 1, 18, 9, 30, 4, 27] * 3, 0.6, seed=2)


@pytest.fixture()
def blocks(tmp_path: Path) -> Callable[..., EvaluationBlocks]:
    def cut(text: Text = TEXT, context: int = CONTEXT, limit: int = 10**6) -> EvaluationBlocks:
        text.write(tmp_path, "test", SIZE, documents_a_shard=3)
        return EvaluationBlocks(TokenStream(tmp_path, "test"), context, 1, limit, 0)

    return cut


def pieces(patch_size: int, context: int = CONTEXT) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Document, last token before, and tokens of every patch of every block but the first of each."""
    return [
        (place.document, place.history, place.following[:patch_size])
        for place in places(TEXT, context, patch_size)
        if len(place.history) < context
    ]


def decoded(patch_size: int, temperature: float, patch: Sequence[int], wanted: Sequence[int]) -> float:
    """p(wanted | z) of the latent of ``patch``: ``code_autoencoder`` gives its tokens sqrt(hidden size), others 0."""
    right = math.exp(math.sqrt(patch_size * SIZE + 1) / temperature)
    each = [right if one == other else 1.0 for one, other in zip(patch, wanted, strict=True)]
    return math.prod(each) / (right + SIZE - 1) ** patch_size


@cache
def moments(
    patch_size: int, temperature: float, samples: int, last: int, wanted: tuple[int, ...]
) -> tuple[float, float]:
    """Expectation and variance of -log mean_n p(x | z_n), of ``samples`` tosses of the coin."""
    heads, tails = (decoded(patch_size, temperature, one, wanted) for one in COIN[patch_size][last])
    tosses = scipy.stats.binom(samples, 0.5)
    values = [-math.log((n * heads + (samples - n) * tails) / samples) for n in range(samples + 1)]
    weights = tosses.pmf(np.arange(samples + 1))
    mean = float(np.dot(weights, values))
    return mean, float(np.dot(weights, np.square(values)) - mean**2)


def exact(patch_size: int, temperature: float, samples: int) -> tuple[float, float]:
    """The same of all ``pieces`` together."""
    each = [moments(patch_size, temperature, samples, history[-1], wanted) for _, history, wanted in pieces(patch_size)]
    return sum(mean for mean, _ in each), sum(variance for _, variance in each)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_bound_is_what_it_must_be_in_expectation(blocks: Callable[..., EvaluationBlocks], patch_size: int) -> None:
    found = calm_surprise(*coin_calm(COIN[patch_size]), blocks())
    asked = pieces(patch_size)
    assert found.document.tolist() == [document for document, _, _ in asked]
    assert set(found.tokens.tolist()) == {patch_size}
    assert found.nats.shape == (len(TEMPERATURES), len(SAMPLES), len(asked))
    for row, temperature in zip(found.nats, TEMPERATURES, strict=True):
        truth = sum(
            -math.log(sum(decoded(patch_size, temperature, one, wanted) for one in COIN[patch_size][history[-1]]) / 2)
            for _, history, wanted in asked
        )
        expectations = []
        for nats, samples in zip(row, SAMPLES, strict=True):
            expectation, variance = exact(patch_size, temperature, samples)
            expectations.append(expectation)
            variance *= samples / SAMPLES[-1]  # so many groups are averaged
            assert float(nats.sum()) == pytest.approx(expectations[-1], abs=4.5 * math.sqrt(variance) + 1e-2)
        assert sorted(expectations, reverse=True) == expectations
        assert expectations[-1] > truth
        assert expectations[-1] - truth < 0.05 * (expectations[0] - truth) + 1e-6


def test_each_position_and_block_has_samples_of_its_own(blocks: Callable[..., EvaluationBlocks]) -> None:
    # The same text again and again: only the draws differ.
    text = Text([[0, 1, 2, 3] * 30])
    nats = calm_surprise(*coin_calm(COIN[2]), blocks(text)).nats[0]
    after_one = nats.unflatten(-1, (-1, 5))[..., ::2].flatten(1)
    for row in after_one[:2]:  # by N
        assert len(set(row.tolist())) > 5
    # Of 64 groups of one sample the mean of -log p has 65 values; groups that overlapped would have others.
    heads, tails = (-math.log(decoded(2, 1.0, one, [2, 3])) for one in COIN[2][1])
    shares = (after_one[0] - tails) / (heads - tails) * 64
    assert torch.allclose(shares, shares.round(), atol=1e-2)


def test_fewer_samples_are_drawn_if_fewer_are_asked_for(blocks: Callable[..., EvaluationBlocks]) -> None:
    found = calm_surprise(*coin_calm(COIN[2]), blocks(), samples=(4,))
    wanted, variance = exact(2, 2.0, 4)
    assert float(found.nats[1, 0].sum()) == pytest.approx(wanted, abs=4.5 * math.sqrt(variance))


def test_groups_are_disjoint() -> None:
    log_p = torch.randn(2, 64, 3, 5)
    for samples in SAMPLES:
        wanted = [
            -torch.stack([log_p[:, n] for n in range(first, first + samples)]).double().exp().mean(dim=0).log()
            for first in range(0, 64, samples)
        ]
        assert torch.allclose(bound(log_p, samples).double(), torch.stack(wanted).mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_log_probabilities_are_those_of_a_softmax(vocabulary: int) -> None:
    model = Autoencoder(AutoencoderConfig(vocabulary, 4, 16, 24, 8)).requires_grad_(False)
    model.initialise(torch.Generator().manual_seed(0))
    model.encoder.embedding.weight.mul_(20)  # far from even
    latents = 3 * torch.randn(3, 50, 8)
    patches = torch.randint(vocabulary, (3, 50, 4))
    found = log_probabilities(model, latents, patches)
    for row, temperature in zip(found, TEMPERATURES, strict=True):
        logits = model.logits(latents).double() / temperature
        wanted = -F.cross_entropy(logits.flatten(0, 2), patches.flatten(), reduction="none").view(3, 50, 4).sum(dim=-1)
        assert torch.allclose(row.double(), wanted, rtol=1e-5, atol=1e-4)
    assert found.std() > 1


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_transformer_is_scored_on_the_tokens_of_a_calm(
    blocks: Callable[..., EvaluationBlocks], patch_size: int
) -> None:
    model, after = history_transformer(TABLE, 2.0)
    found = transformer_surprise(model, blocks(), patch_size)
    scored = [place for place in places(TEXT, CONTEXT, 1) if patch_size <= len(place.history) < CONTEXT]
    assert found.document.tolist() == [place.document for place in scored]
    wanted = [-math.log(after(place.history)[place.following[0]]) for place in scored]
    assert found.nats.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    of_calm = calm_surprise(*coin_calm(COIN[patch_size]), blocks(), samples=(1,))
    assert found.tokens.sum() == of_calm.tokens.sum()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_token_head_has_its_likelihood_on_the_tokens_of_any_calm(
    blocks: Callable[..., EvaluationBlocks], patch_size: int
) -> None:
    found = token_head_surprise(bigram_calm(TABLE, patch_size), blocks())
    scored = [place for place in places(TEXT, CONTEXT, 1) if patch_size <= len(place.history) < CONTEXT]
    assert found.document.tolist() == [place.document for place in scored]
    wanted = [-math.log(TABLE[place.history[-1], place.following[0]]) for place in scored]
    assert found.nats.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert found.tokens.tolist() == [1] * len(scored)


def test_the_likelihood_of_a_token_head_is_that_of_its_blocks(blocks: Callable[..., EvaluationBlocks]) -> None:
    # A model that looks back at all of its block, and no farther.
    model = Calm(CalmConfig(SIZE, 2, 8, BackboneConfig(8, 12, 2, 2, 1), TokenHeadConfig(8, 12, 2)))
    initialise(model.requires_grad_(False), torch.Generator().manual_seed(0), embedding_std=1.0)
    some = blocks()
    wanted = []
    for start in some.starts.tolist():
        block = torch.tensor(TEXT.stream[start : start + CONTEXT]).view(1, -1, 2)
        for patch in range(1, CONTEXT // 2):
            hidden_state = model(block[:, :patch])[:, -1]
            for place in (0, 1):
                earlier = block[:, patch - 1 : patch + 1].flatten(1)[:, : 2 + place]
                logits = model.head.logits(hidden_state, earlier)
                wanted.append(F.cross_entropy(logits, block[:, patch, place]).item())
    assert token_head_surprise(model, some).nats.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_context_of_one_patch_has_one_token(blocks: Callable[..., EvaluationBlocks]) -> None:
    some = blocks(context=4)
    found = transformer_surprise(bigram_transformer(TABLE), some, 4)
    assert len(found.nats) == len(some.starts)


def test_means_and_their_interval() -> None:
    draws = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        lengths = draws.integers(1, 40, size=60)
        # A document is easy or hard as a whole, so that its tokens say little more than one does.
        nats = np.concatenate([draws.normal(3 + draws.normal(), 0.1, size=length) for length in lengths])
        document = torch.from_numpy(np.repeat(2 * np.arange(60), lengths))
        found = likelihood(Surprise(document, torch.ones_like(document), torch.from_numpy(nats)), 1000)
        assert found.nats_per_token == pytest.approx(nats.mean())
        assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / 1000)
        covered += found.nats_per_token_ci95[0] < 3 < found.nats_per_token_ci95[1]
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_one_document_has_no_interval() -> None:
    surprise = Surprise(torch.zeros(2, dtype=torch.int64), torch.tensor([4, 4]), torch.tensor([8.0, 16.0]))
    found = likelihood(surprise, 12)
    assert (found.nats_per_token, found.nats_per_token_ci95, found.bits_per_byte_ci95) == (3.0, None, None)


def test_bytes_are_those_of_the_text_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "bcd": 2, "é": 3}, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    Text([[1, 2, 3, 1, 2, 0], [3, 3, 0], [2, 2, 2]]).write(tmp_path, "test", SIZE, documents_a_shard=9)
    for context, patch_size, wanted in ((4, 2, 2 + 1 + 2 + 2), (4, 4, 1 + 2), (8, 2, 2 + 1 + 3 + 2 + 2)):
        some = EvaluationBlocks(TokenStream(tmp_path, "test"), context, 1, 100, 0)
        assert scored_bytes(tokenizer, some, patch_size) == wanted


def test_the_best_temperature_is_that_of_most_samples() -> None:
    nats = torch.tensor([[[1.0, 1.0], [9.0, 1.0]], [[9.0, 9.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 1.0]]])
    assert best_temperature(Surprise(torch.zeros(2), torch.ones(2), nats)) == 1


def test_there_is_a_block_however_few_tokens_are_asked_for(blocks: Callable[..., EvaluationBlocks]) -> None:
    assert len(likelihood_blocks(blocks(), 1).starts) == 1
    assert len(likelihood_blocks(blocks(), 40).starts) == 3
    assert likelihood_blocks(blocks(), 40).batch == 1
