"""Texts at a temperature from models whose distribution is known: what they say converges to closed forms."""

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.evaluation.brier import terms_from_samples
from calm_core.inference.decoding import Sampling
from calm_core.inference.sampled_continuations import PROMPTS_AT_ONCE, sampled_continuations
from calm_core.runtime.precision import set_threads
from tests.calm_core.known_models import Paths, bigram_transformer, coin_calm

SIZE = 4
TABLE = np.array([[0.5, 0.3, 0.1, 0.1], [0.05, 0.05, 0.2, 0.7], [0.25, 0.25, 0.25, 0.25], [0.6, 0.2, 0.15, 0.05]])
NEXT_PATCHES = [[[1, 2], [1, 0]], [[0, 1], [0, 2]], [[3, 2], [3, 0]], [[2, 3], [1, 3]]]
HEADS = 0.7
"""How often the second of two next patches comes."""
DRAWS = Sampling().draws
COPIES = 6


def loaded_coin_calm() -> tuple[Calm, Autoencoder]:
    """A CALM whose two next patches have the probabilities 1 - ``HEADS`` and ``HEADS``."""
    model, autoencoder = coin_calm(NEXT_PATCHES)
    projection = model.head.noise_projection
    # The sign of noise in [-0.5, 0.5) decides, so what is added to the noise moves the odds.
    projection.bias.copy_((HEADS - 0.5) * projection.weight[:, 0])
    return model, autoencoder


def of_tokens(temperature: float) -> Callable[[int], Paths]:
    """The continuations of a token by four of the Transformer, with their probabilities."""
    sharpened = TABLE ** (1 / temperature)
    sharpened /= sharpened.sum(axis=1, keepdims=True)

    def paths(last: int) -> Paths:
        found: Paths = {}
        for path in itertools.product(range(SIZE), repeat=4):
            found[path] = float(np.prod([sharpened[a, b] for a, b in itertools.pairwise((last, *path))]))
        return found

    return paths


def of_patches(temperature: float) -> Callable[[int], Paths]:
    """The same of the CALM, by the batch approximation: a patch seen c times weighs C(c, 1 / T)."""
    counts = np.arange(DRAWS + 1)
    ways, others = (scipy.special.binom(seen, 1 / temperature) for seen in (counts, DRAWS - counts))
    of_counts = scipy.stats.binom.pmf(counts, DRAWS, HEADS)
    heads = HEADS if temperature == 1 else float((of_counts * ways / (ways + others)).sum())
    target = HEADS ** (1 / temperature) / (HEADS ** (1 / temperature) + (1 - HEADS) ** (1 / temperature))
    assert heads == pytest.approx(target, abs=0.005)

    def paths(last: int) -> Paths:
        found: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for first, second in itertools.product((0, 1), repeat=2):
            patch = NEXT_PATCHES[last][first]
            chance = [1 - heads, heads][first] * [1 - heads, heads][second]
            found[*patch, *NEXT_PATCHES[patch[-1]][second]] += chance
        return found

    return paths


def assert_terms(paths: Callable[[int], Paths], samples: Tensor, prompts: Tensor, targets: Tensor) -> None:
    """Accuracy and collision of ``samples`` are what ``paths`` says, within four and a half standard errors."""
    terms = terms_from_samples(samples, targets)
    for length in range(1, 5):
        chances: list[defaultdict[tuple[int, ...], float]] = [defaultdict(float) for _ in range(SIZE)]
        for last in range(SIZE):
            for path, chance in paths(last).items():
                chances[last][path[:length]] += chance
        ends = prompts[:, -1].tolist()
        right = np.array(
            [chances[last][tuple(target[:length])] for last, target in zip(ends, targets.tolist(), strict=True)]
        )
        collide = [sum(chance**2 for chance in of_last.values()) for of_last in chances]
        same = np.array([collide[last] for last in ends])
        for term, chance in ((terms.accuracy, right), (terms.collision, same)):
            residuals = term[:, length - 1].double().numpy() - chance
            error = residuals.std() / np.sqrt(len(residuals))
            assert abs(residuals.mean()) < 4.5 * error + 1e-6
            assert error < 0.015


@pytest.fixture()
def prompts() -> Tensor:
    return torch.randint(SIZE, (400, 4), generator=torch.Generator().manual_seed(5))


@pytest.fixture()
def targets() -> Tensor:
    return torch.randint(SIZE, (400, 4), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 0.3])
def test_terms_of_a_transformer(prompts: Tensor, targets: Tensor, temperature: float) -> None:
    found = sampled_continuations(
        bigram_transformer(TABLE), None, prompts, 4, COPIES, Sampling(temperature), 0, "test", str(temperature)
    )
    assert_terms(of_tokens(temperature), found.token_ids, prompts, targets)
    assert found.exact.min() == found.reached.min() == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 0.3])
def test_terms_of_a_calm(prompts: Tensor, targets: Tensor, temperature: float) -> None:
    # Half of the true texts are what the model writes most often, or it would seldom be right.
    for row, last in enumerate(prompts[::2, -1].tolist()):
        patch = NEXT_PATCHES[last][1]
        targets[2 * row] = torch.tensor([*patch, *NEXT_PATCHES[patch[-1]][1]])
    model, autoencoder = loaded_coin_calm()
    found = sampled_continuations(
        model, autoencoder, prompts, 4, COPIES, Sampling(temperature), 0, "test", str(temperature)
    )
    assert_terms(of_patches(temperature), found.token_ids, prompts, targets)
    # The batch approximation is exact at no step.
    assert found.exact.unique().tolist() == [float(temperature == 1)]
    assert found.reached.min() == 1


@pytest.mark.parametrize(("temperature", "budget", "share"), [(0.5, 20_000, 1), (0.4, 20_000, 0), (0.5, 1, 0)])
def test_the_exact_sampler_is_exact_within_its_budget_at_whole_powers(
    prompts: Tensor, temperature: float, budget: int, share: float
) -> None:
    model, autoencoder = loaded_coin_calm()
    sampling = Sampling(temperature, "exact", budget=budget)
    found = sampled_continuations(model, autoencoder, prompts[:20], 4, 2, sampling, 0, "test")
    assert found.exact.unique().tolist() == [share]


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1), (0.7, 1), (0.5, HEADS**2 + (1 - HEADS) ** 2), (0.3, 0)])
def test_the_temperature_is_reached_where_draws_repeat(prompts: Tensor, temperature: float, share: float) -> None:
    """Of two draws a patch, both of which have to be equal at 0.5; at 0.3 it would take three."""
    model, autoencoder = loaded_coin_calm()
    sampling = Sampling(temperature, draws=2)
    found = sampled_continuations(model, autoencoder, prompts, 4, 2, sampling, 0, "test")
    error = (share * (1 - share) / found.reached.numel() / 2) ** 0.5
    assert abs(float(found.reached.mean()) - share) <= 4 * error


def test_all_have_the_length_asked_for_and_prompts_keep_their_order() -> None:
    """Each step is certain: the next patch depends on the last token alone, whatever the temperature."""
    certain = [[patches[0]] * 2 for patches in NEXT_PATCHES]
    model, autoencoder = coin_calm(certain)
    prompts = torch.arange(2 * PROMPTS_AT_ONCE + 3)[:, None] % SIZE * torch.ones(2, dtype=torch.int64)
    for temperature in (1.0, 0.5):
        found = sampled_continuations(model, autoencoder, prompts, 7, 3, Sampling(temperature), 0, "test")
        assert found.token_ids.shape == (3, len(prompts), 7)
        assert found.exact.shape == (3, len(prompts))
        for prompt, *continuations in zip(prompts.tolist(), *found.token_ids.tolist(), strict=True):
            expected = prompt
            while len(expected) < 2 + 7:
                expected = [*expected, *certain[expected[-1]][0]]
            assert continuations == [expected[2:9]] * 3


def test_draws_are_keyed_by_their_purpose_and_by_nothing_else(prompts: Tensor) -> None:
    model, autoencoder = loaded_coin_calm()

    def drawn(*purpose: str, seed: int = 0) -> Tensor:
        some = prompts[: 3 * PROMPTS_AT_ONCE]
        return sampled_continuations(model, autoencoder, some, 8, 2, Sampling(), seed, *purpose).token_ids

    first = drawn("one")
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            set_threads(number)
            assert torch.equal(first, drawn("one"))
    finally:
        set_threads(threads)
    assert not torch.equal(first, drawn("two"))
    assert not torch.equal(first, drawn("one", seed=1))
    # Copies and batches draw numbers of their own: two alike would be one text counted twice.
    alike = prompts[:1].repeat(2 * PROMPTS_AT_ONCE, 1)
    texts = sampled_continuations(model, autoencoder, alike, 32, 2, Sampling(), 0, "test").token_ids
    assert len({tuple(text) for text in texts.flatten(0, 1).tolist()}) > 60
