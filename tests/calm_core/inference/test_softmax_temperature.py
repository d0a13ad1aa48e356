"""Temperature from latents that know probabilities, against distributions that can be written out."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from calm_core.inference.softmax_temperature import softmax_temperature

UNLIKELY = 1e-6
"""A p-value that no stream of random numbers gives by chance."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class KnownLatents:
    """``tables`` [kinds, latents, K, V] of p_k(v | z); a context of kind row % kinds has its latents equally often."""

    def __init__(self, tables: Tensor, rng: torch.Generator) -> None:
        self.tables, self.rng = tables, rng
        self.rows_at_once: list[int] = []

    def __call__(self, rows: Tensor, count: int) -> Tensor:
        drawn = torch.randint(self.tables.shape[1], (count, len(rows)), generator=self.rng)
        self.rows_at_once.append(len(rows))
        # Logits are what a constant may be added to.
        return self.tables[rows % len(self.tables), drawn].log() + 3

    def probabilities(self) -> Tensor:
        """P of each symbol, [kinds, V^K], the symbols in lexicographic order."""
        _, _, size, vocabulary = self.tables.shape
        symbols = torch.tensor(list(itertools.product(range(vocabulary), repeat=size)))
        of_latents = torch.stack([self.tables[:, :, k, symbols[:, k]] for k in range(size)]).prod(dim=0)
        return of_latents.mean(dim=1)


def known_latents(kinds: int = 1, latents: int = 6, size: int = 2, sharpness: float = 2.0) -> KnownLatents:
    logits = sharpness * torch.randn(kinds, latents, size, 3, generator=generator(7), dtype=torch.float64)
    return KnownLatents(logits.softmax(dim=-1), generator(1))


def power(probabilities: Tensor, temperature: float) -> Tensor:
    return (probabilities.log() / temperature).softmax(dim=-1)


def numbers(symbols: Tensor) -> Tensor:
    """Place of ``symbols`` [rows, K] of three tokens in lexicographic order."""
    return (symbols * 3 ** torch.arange(symbols.shape[1]).flip(0)).sum(dim=1)


def p_value(symbols: Tensor, expected: Tensor) -> float:
    observed = torch.bincount(numbers(symbols), minlength=len(expected)).double()
    return float(chisquare(observed.numpy(), (expected / expected.sum() * observed.sum()).numpy()).pvalue)


def test_temperature_one_is_exact_and_takes_one_latent() -> None:
    draw = known_latents(kinds=2)
    sample = softmax_temperature(draw, 20_000, 1, generator(), latents=5)
    for kind, expected in enumerate(draw.probabilities()):
        assert p_value(sample.symbols[kind::2], expected) > UNLIKELY
    assert sample.exact and sample.finished.all() and (sample.draws == 1).all()


@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.4, 1 / 3, 0.2])
def test_the_distance_to_the_power_vanishes_as_latents_grow(temperature: float) -> None:
    """Each of four contexts towards its own; with few latents the bias shows, with many nothing does."""
    far = []
    for latents, rows in ((3, 8000), (100, 1600)):
        draw = known_latents(kinds=4, sharpness=4.0)
        sample = softmax_temperature(draw, rows, temperature, generator(), latents=latents, rows_at_once=400)
        assert (sample.draws == latents).all() and sample.reached.all()
        assert not sample.exact and not sample.finished.any()
        distances, noises = [], []
        for kind, expected in enumerate(power(draw.probabilities(), temperature)):
            found = torch.bincount(numbers(sample.symbols[kind::4]), minlength=9) / (rows // 4)
            distances.append((found - expected).abs().sum().item() / 2)
            noises.append((expected * (1 - expected) / (rows // 4)).sqrt().sum().item() / 2)
        far.append((sum(distances) / 4, sum(noises) / 4))
    # Samples of the target itself would show 0.8 times the noise.
    assert far[0][0] > 1.5 * far[0][1]
    assert far[1][0] < 1.2 * far[1][1]


def test_pairs_are_those_of_the_derivation() -> None:
    """At T = 0.5 E[A(x) / sum A(y)], over every outcome of three draws from three latents, written out."""
    draw = known_latents(latents=3)
    tables = draw.tables[0]
    of_latents = torch.stack([torch.outer(*table).flatten() for table in tables])
    expected = torch.zeros(9, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=3):
        agreement = sum(of_latents[a] * of_latents[b] for a, b in itertools.combinations(drawn, 2))
        assert isinstance(agreement, Tensor)
        expected += agreement / agreement.sum() / 27
    sample = softmax_temperature(draw, 60_000, 0.5, generator(), latents=3)
    assert p_value(sample.symbols, expected) > UNLIKELY
    assert p_value(sample.symbols, power(draw.probabilities()[0], 0.5)) < UNLIKELY


def drawn_anyway(logits: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Always the latents of ``logits`` [latents, K, V]."""

    def draw(rows: Tensor, count: int) -> Tensor:
        return logits[:count, None].expand(-1, len(rows), -1, -1)

    return draw


CERTAIN = 60 * torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 1], [2, 2], [0, 1], [2, 2], [1, 0]]), 3).float()
"""Latents of one symbol each: three of one, two of another, one of a third."""


@pytest.mark.parametrize(
    ("temperature", "weights"),
    [
        (0.5, [3, 1, 0]),  # C(3, 2) and C(2, 2): certain latents are counted, as the batch algorithm counts
        (2 / 3, [3 * (2 / 5) ** 0.5, 2 * (1 / 5) ** 0.5, 0]),
    ],
)
def test_certain_latents_are_counted(temperature: float, weights: list[float]) -> None:
    sample = softmax_temperature(drawn_anyway(CERTAIN), 10_000, temperature, generator(), latents=6)
    observed = torch.bincount(numbers(sample.symbols), minlength=9)[[1, 8, 3]].tolist()
    assert sum(observed) == 10_000
    assert [count > 0 for count in observed] == [weight > 0 for weight in weights]
    expected = torch.tensor([weight for weight in weights if weight]).double()
    there = [count for count in observed if count]
    assert float(chisquare(there, (expected / expected.sum() * 10_000).numpy()).pvalue) > UNLIKELY


def test_a_third_latent_confirms_a_pair() -> None:
    """At T = 1/3 the symbol of two latents is taken only if all six candidates are it, each with probability 1/4."""
    sample = softmax_temperature(drawn_anyway(CERTAIN), 10_000, 1 / 3, generator(), latents=6)
    observed = torch.bincount(numbers(sample.symbols), minlength=9).tolist()
    assert observed[1] + observed[8] == 10_000
    assert observed[8] < 20


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_low_temperatures_take_the_likeliest_candidate(temperature: float) -> None:
    draw = known_latents(sharpness=4.0)
    sample = softmax_temperature(draw, 200, temperature, generator(), latents=200, rows_at_once=50)
    probabilities = draw.probabilities()[0]
    # The two likeliest are hard to tell apart by 200 latents.
    likeliest = probabilities >= 0.7 * probabilities.max()
    assert 1 <= likeliest.sum() <= 2
    assert likeliest[numbers(sample.symbols)].double().mean() > 0.95


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.3])
def test_latents_that_share_no_token_still_give_a_symbol(temperature: float) -> None:
    apart = 1000 * torch.nn.functional.one_hot(torch.arange(4), 4).float()[:, None]
    sample = softmax_temperature(drawn_anyway(apart), 50, temperature, generator(), latents=4)
    assert ((sample.symbols >= 0) & (sample.symbols < 4)).all()


def test_rows_are_taken_as_many_as_fit() -> None:
    draw = known_latents()
    softmax_temperature(draw, 10, 0.5, generator(), latents=3, rows_at_once=4)
    assert draw.rows_at_once == [4, 4, 2]


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, math.nan])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="allowed is 0 < temperature <= 1"):
        softmax_temperature(known_latents(), 2, temperature, generator(), latents=4)


def test_too_few_latents() -> None:
    with pytest.raises(ValueError, match="latents are 2; 3 or more"):
        softmax_temperature(known_latents(), 2, 0.5, generator(), latents=2)
