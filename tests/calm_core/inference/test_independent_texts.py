"""A text does not depend on the prompts beside it, and each has numbers of its own: every model, every sampler."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.inference import decoding
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import BATCH_PROMPTS, Continuation, LanguageModel
from calm_core.nn.backbone import BackboneConfig
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.known_models import COIN, bigram_transformer, coin_calm, walk
from tests.support.tiny_models import few_words, weighted

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
PROMPTS = [[2 + (5 * n + k) % 250 for k in range(n)] for n in range(9)]
"""Prompts of every length from 0 to 8."""
TOKENS = 31  # more steps than numbers are drawn for at once
UNLIKELY = 1e-6

LATENT_HEADS: dict[str, Any] = {
    "energy": EnergyHeadConfig(1, 8),
    "diffusion": DiffusionHeadConfig(1, sampling_steps=3),
    "flow": FlowHeadConfig(1, "euler", 3),
}
SHARP = [Sampling(0.5, draws=30), Sampling(0.4, "exact", draws=9, budget=40), Sampling(0.5, "softmax", latents=4)]
CASES = [(name, Sampling()) for name in ("energy", "diffusion", "flow", "coin", "tokens", "transformer")]
CASES += [(name, sampling) for name in ("energy", "diffusion", "coin") for sampling in SHARP]
CASES += [("coin", Sampling(0.5, "exact")), ("energy", Sampling(1.0, "softmax")), ("energy", Sampling(0.7, "softmax"))]
CASES += [(name, Sampling(0.5)) for name in ("tokens", "transformer")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return few_words()


def built(kind: str, tokenizer: Tokenizer) -> LanguageModel:
    size = tokenizer.get_vocab_size()
    autoencoder = None
    if kind == "transformer":
        model = weighted(Transformer(TransformerConfig(size, BACKBONE)), 0)
    elif kind == "tokens":
        model = weighted(Calm(CalmConfig(size, 3, 16, BACKBONE, TokenHeadConfig(12, 16, 1))), 0)
    elif kind == "coin":
        # Of four tokens, of which the end of a text is none; equal patches are frequent.
        model, autoencoder = coin_calm([[[2, 2], [3, 3]], [[2, 3], [3, 2]], [[2, 3], [3, 3]], [[3, 2], [2, 2]]])
    else:
        model = weighted(Calm(CalmConfig(size, 3, 12, BACKBONE, LATENT_HEADS[kind])), 0)
        autoencoder = weighted(Autoencoder(AutoencoderConfig(size, 3, 16, 24, 12)), 1)
    return LanguageModel(model, autoencoder, tokenizer, 64)


def prompts_for(kind: str) -> list[list[int]]:
    return [[2 + token % 2 for token in prompt] for prompt in PROMPTS[1:]] if kind == "coin" else PROMPTS


def final(model: LanguageModel, prompts: list[list[int]], sampling: Sampling, seed: int = 0) -> list[Continuation]:
    *_, last = model.stream(prompts, TOKENS, sampling, seed)
    return last


@pytest.mark.parametrize(("kind", "sampling"), CASES)
def test_a_text_is_the_same_in_any_company(kind: str, sampling: Sampling, tokenizer: Tokenizer) -> None:
    model, prompts = built(kind, tokenizer), prompts_for(kind)
    alone = [final(model, [prompt], sampling)[0] for prompt in prompts]
    assert final(model, prompts, sampling) == alone
    assert final(model, prompts[::-1], sampling) == alone[::-1]
    # More rows than a call of the head takes together; texts of one prompt are numbered, and the first is that alone.
    numbered = final(model, prompts[3:4] * 3, sampling)
    mixed = final(model, [*prompts[3:5], *prompts[3:4] * 2, *prompts[:2] * 8], sampling)
    assert [mixed[0], mixed[2], mixed[3]] == numbered
    assert numbered[0] == alone[3]
    assert [mixed[1], mixed[4], mixed[5]] == [alone[4], alone[0], alone[1]]
    texts = {tuple(text.token_ids) for text in numbered}
    assert len(texts) == 3
    assert final(model, prompts[3:4], sampling, seed=1)[0].token_ids not in map(list, texts)


@pytest.mark.parametrize("kind", ["energy", "diffusion"])
def test_a_text_is_the_same_in_whatever_parts_its_patches_are_sampled(
    kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(kind, tokenizer)
    expected = final(model, PROMPTS, SHARP[0])
    monkeypatch.setattr(decoding, "PATCHES_AT_ONCE", 2 * len(PROMPTS))
    assert final(model, PROMPTS, SHARP[0]) == expected


def test_a_text_is_the_same_at_any_place_of_a_long_list(tokenizer: Tokenizer) -> None:
    model = built("tokens", tokenizer)
    prompts = [[7 + number % 11] for number in range(2 * BATCH_PROMPTS + 5)]
    found = list(model.continuations(prompts, 9, Sampling(), 3))
    for first in range(11):
        # Every eleventh is the same prompt, in whichever batch.
        assert found[first::11] == list(model.continuations(prompts[first::11], 9, Sampling(), 3))
    assert len({tuple(text.token_ids) for text in found}) == len(found)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_streams_of_many_texts_follow_the_distribution(temperature: float, tokenizer: Tokenizer) -> None:
    """The first tokens of 4,000 numbered texts, and whether those of the next step know anything of them."""
    table = torch.tensor([[1, 2, 3, 4]] * 4, dtype=torch.float64).pow(temperature) / 10**temperature
    model = LanguageModel(bigram_transformer((table / table.sum(dim=1, keepdim=True)).numpy()), None, tokenizer, 64)
    found = [text.token_ids for text in model.continuations([[2]] * 4000, 3, Sampling(temperature), 0)]
    # Of texts that the end-of-text token, number 1, does not end.
    firsts = Counter(text[0] if text else 1 for text in found)
    observed = [firsts[token] for token in range(4)]
    assert sum(observed) == 4000
    assert chisquare(observed, [400, 800, 1200, 1600]).pvalue > UNLIKELY
    longer = [text for text in found if len(text) == 3]
    for first, second in itertools.combinations(range(3), 2):
        pairs = Counter((text[first], text[second]) for text in longer)
        counts = [[pairs[one, other] for other in (0, 2, 3)] for one in (0, 2, 3)]
        assert chi2_contingency(counts).pvalue > UNLIKELY
    # Neighbours in the list: their streams are no shifted copies of each other.
    neighbours = Counter(itertools.pairwise(text[0] if text else 1 for text in found))
    assert chi2_contingency([[neighbours[one, other] for other in range(4)] for one in range(4)]).pvalue > UNLIKELY


def test_end_tokens_of_neighbours_change_nothing(tokenizer: Tokenizer) -> None:
    model = LanguageModel(bigram_transformer(walk(9, 3)), None, tokenizer, 64)
    prompts = [[token] for token in range(9)] * 3
    together = final(model, prompts, Sampling())
    assert len({len(text.token_ids) for text in together}) > 2
    for token in range(9):
        assert final(model, [[token]] * 3, Sampling()) == together[token::9]


def test_known_patches(tokenizer: Tokenizer) -> None:
    model, autoencoder = coin_calm(COIN[2])
    calm = LanguageModel(model, autoencoder, tokenizer, 64)
    found = [text.token_ids for text in calm.continuations([[3]] * 800, 2, Sampling(), 0)]
    # (0, 1), which the end-of-text token cuts, or (0, 2).
    counts = Counter(map(tuple, found))
    assert set(counts) == {(0,), (0, 2)}
    assert chisquare(list(counts.values())).pvalue > UNLIKELY
