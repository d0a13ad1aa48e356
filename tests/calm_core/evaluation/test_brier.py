"""The Brier estimators against distributions whose scores are known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.evaluation.brier import (
    brier_from_probabilities,
    brier_from_samples,
    brierlm,
    terms_from_samples,
)
from calm_core.evaluation.continuations import calm_continuations, transformer_brier
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.tokens.blocks import MAX_TOKENS
from calm_core.transformer.model import Transformer, TransformerConfig

ROWS = 60_000
CHAIN = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
"""A Markov chain over three tokens: entry [i, j] is P(next is j | this is i)."""


def exact_brier(chain: Tensor, start: int, target: list[int]) -> list[float]:
    """Brier-1 to Brier-4 of the chain's continuation of ``start``, by enumeration."""
    scores = []
    for length in range(1, MAX_TOKENS + 1):
        probability = {}
        for path in itertools.product(range(len(chain)), repeat=length):
            steps = zip((start, *path), path, strict=False)
            probability[path] = math.prod(float(chain[a, b]) for a, b in steps)
        scores.append(2 * probability[tuple(target[:length])] - sum(p * p for p in probability.values()))
    return scores


def sample_chain(start: Tensor, generator: torch.Generator) -> Tensor:
    """Continuations by four tokens, [*start.shape, 4]."""
    path = [start]
    for _ in range(MAX_TOKENS):
        path.append(torch.multinomial(CHAIN[path[-1].flatten()], 1, generator=generator).view(start.shape))
    return torch.stack(path[1:], dim=-1)


def assert_mean(values: Tensor, exact: list[float]) -> None:
    """The mean over rows [rows, n] agrees with ``exact`` within five standard errors."""
    error = values.std(dim=0) / math.sqrt(len(values))
    assert torch.all((values.mean(dim=0) - torch.tensor(exact)).abs() < 5 * error + 1e-6), (values.mean(0), exact)


def test_terms_are_counts_of_hits_and_of_pairs() -> None:
    samples = torch.randint(3, (4, 50, 3), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(3, (50, 3), generator=torch.Generator().manual_seed(1))
    terms = terms_from_samples(samples, targets)
    for position, length in itertools.product(range(50), (1, 2, 3)):
        texts = [tuple(text[:length]) for text in samples[:, position].tolist()]
        hits = [text == tuple(targets[position, :length].tolist()) for text in texts]
        pairs = [first == second for first, second in itertools.combinations(texts, 2)]
        assert terms.accuracy[position, length - 1].item() == pytest.approx(np.mean(hits))
        assert terms.collision[position, length - 1].item() == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_samples_estimate_without_bias(samples: int) -> None:
    target = [1, 2, 1, 0]
    drawn = sample_chain(torch.zeros(samples, ROWS, dtype=torch.int64), torch.Generator().manual_seed(samples))
    assert_mean(brier_from_samples(drawn, torch.tensor(target).expand(ROWS, 4)), exact_brier(CHAIN, 0, target))


def test_more_samples_have_less_variance() -> None:
    drawn = sample_chain(torch.zeros(8, ROWS, dtype=torch.int64), torch.Generator().manual_seed(0))
    target = torch.tensor([1, 2, 1, 0]).expand(ROWS, 4)
    assert torch.all(brier_from_samples(drawn, target).var(dim=0) < brier_from_samples(drawn[:2], target).var(dim=0))


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="2 samples"):
        brier_from_samples(torch.zeros(1, 3, 4), torch.zeros(3, 4))


def test_probabilities_estimate_without_bias_and_with_less_variance() -> None:
    target = torch.tensor([1, 2, 1, 0])
    drawn = sample_chain(torch.zeros(2, ROWS, dtype=torch.int64), torch.Generator().manual_seed(7))
    before = torch.cat([torch.zeros(2, ROWS, 1, dtype=torch.int64), drawn[..., :3]], dim=-1)
    steps = CHAIN[before, drawn].log()
    prefix = torch.cat([torch.zeros(2, ROWS, 1), steps[..., :3].cumsum(dim=-1)], dim=-1)
    collision = CHAIN[before].square().sum(dim=-1)
    of_target = CHAIN[torch.tensor([0, 1, 2, 1]), target].log().expand(ROWS, 4)
    scores = brier_from_probabilities(of_target, prefix, collision)
    assert_mean(scores, exact_brier(CHAIN, 0, target.tolist()))
    by_samples = brier_from_samples(drawn, target.expand(ROWS, 4))
    assert torch.all(scores.var(dim=0) < 0.25 * by_samples.var(dim=0))


class ChainHead(nn.Module):
    """Hidden states [..., 1] are the last token; a sample is the chain's next K tokens."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Generator:
        return generator

    def sample(self, hidden_states: Tensor, generator: torch.Generator) -> Tensor:
        return sample_chain(hidden_states[..., 0].long(), generator)[..., : self.patch_size].float()


class ChainCalm(Calm):
    """A CALM whose next tokens follow CHAIN."""

    def __init__(self, patch_size: int) -> None:
        super().__init__(CalmConfig(3, patch_size, patch_size, BackboneConfig(8, 8, 1, 1, 1), EnergyHeadConfig(1, 1)))
        self.head = ChainHead(patch_size)  # type: ignore[assignment]

    def forward(self, inputs: Tensor, *_: object) -> Tensor:
        return inputs[..., -1:].float()


class ChainAutoencoder(Autoencoder):
    """Latents are token ids already."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.long()


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
def test_calm_for_every_patch_size(patch_size: int) -> None:
    autoencoder = ChainAutoencoder(AutoencoderConfig(3, patch_size, 8, 8, patch_size))
    patches = torch.zeros(ROWS // 5, 5, patch_size, dtype=torch.int64)
    model = ChainCalm(patch_size)
    drawn = calm_continuations(model, autoencoder, patches, 4, 2, torch.Generator().manual_seed(patch_size))
    assert drawn.shape == (2, ROWS // 5, 5, 4)
    target = [1, 2, 1, 0]
    scores = brier_from_samples(drawn, torch.tensor(target).expand(ROWS // 5, 5, 4)).flatten(0, 1)
    assert_mean(scores, exact_brier(CHAIN, 0, target))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_each_sample_of_calm_goes_on_from_the_text_up_to_its_place(
    patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each hidden state that is sampled from must be that of the text before the place with the sample's own patches.
    rng = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(11, patch_size, 8, 8, 3))
    model = Calm(CalmConfig(11, patch_size, 3, BackboneConfig(16, 24, 2, 2, 1), EnergyHeadConfig(1, 4)))
    for one in (autoencoder, model):
        initialise(one, rng, embedding_std=1.0)
        one.requires_grad_(False)
    seen: list[Tensor] = []
    sample = model.head.sample

    def recorded(hidden_states: Tensor, draws: Tensor) -> Tensor:
        seen.append(hidden_states.unflatten(0, (2, 2)))
        return sample(hidden_states, draws)

    monkeypatch.setattr(model.head, "sample", recorded)
    patches = torch.randint(11, (2, 3, patch_size), generator=rng)
    drawn = calm_continuations(model, autoencoder, patches, 4, 2, rng)
    assert len(seen) == 4 // patch_size
    for step, number, row, place in itertools.product(range(len(seen)), range(2), range(2), range(3)):
        own = drawn[number, row, place, : step * patch_size].view(-1, patch_size)
        text = torch.cat([patches[row, : place + 1], own])
        torch.testing.assert_close(seen[step][number, row, place], model(text[None])[0, -1], rtol=1e-4, atol=1e-5)


def tiny_transformer() -> Transformer:
    model = Transformer(TransformerConfig(5, BackboneConfig(16, 24, 2, 2, 1)))
    initialise(model, torch.Generator().manual_seed(3), embedding_std=1.0)  # unlike its own, with layers that matter
    return model.eval().requires_grad_(False)


def test_transformer_against_enumeration() -> None:
    model = tiny_transformer()
    token_ids = torch.randint(5, (1, 9), generator=torch.Generator().manual_seed(4))
    leaves = torch.tensor([1, 4])
    exact = torch.zeros(2, 4)
    for row, leaf in enumerate(leaves.tolist()):
        prefix = token_ids[0, : leaf + 1]
        for length in range(1, 5):
            paths = torch.tensor(list(itertools.product(range(5), repeat=length)))
            whole = torch.cat([prefix.expand(len(paths), -1), paths], dim=1)
            steps = model(whole[:, :-1]).log_softmax(-1)[:, leaf:].gather(-1, paths[..., None]).squeeze(-1)
            probability = steps.sum(dim=-1).exp()
            hit = (paths == token_ids[0, leaf + 1 : leaf + 1 + length]).all(dim=-1)
            exact[row, length - 1] = 2 * probability[hit].sum() - probability.square().sum()
    repeated = token_ids.expand(4000, -1)
    scores = transformer_brier(model, repeated, leaves, 2, torch.Generator().manual_seed(5))
    for row in range(2):
        assert_mean(scores[:, row], exact[row].tolist())


def test_brierlm_is_a_geometric_mean() -> None:
    assert brierlm(torch.tensor([0.16, 0.04, 0.01, 0.0025])).item() == pytest.approx(100 * 1.6e-7**0.25)
    assert brierlm(torch.tensor([0.16, -0.04, 0.01, 0.0025])).item() == 0
    assert brierlm(torch.tensor([-0.2, -0.1, -0.05, -0.02])).item() == 0
