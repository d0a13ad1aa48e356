"""Temperature from samples alone, against distributions whose powers are known."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import binom
from scipy.stats import chisquare
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.inference import temperature as temperature_module
from calm_core.inference.temperature import (
    LARGEST_BLOCK,
    TemperatureSample,
    batch_temperature,
    exact_temperature,
    expected_draws,
)

THREE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class KnownSampler:
    """Symbol number k with probability ``probabilities[row % len(probabilities), k]``; keeps a record."""

    def __init__(self, probabilities: Tensor, rng: torch.Generator, symbols: Tensor | None = None) -> None:
        self.probabilities = probabilities if probabilities.ndim == 2 else probabilities[None]
        self.symbols = torch.arange(self.probabilities.shape[1])[:, None] if symbols is None else symbols
        self.rng = rng
        self.blocks: list[tuple[Tensor, Tensor]] = []

    def __call__(self, rows: Tensor, count: int) -> Tensor:
        probabilities = self.probabilities[rows % len(self.probabilities)]
        drawn = self.symbols[torch.multinomial(probabilities, count, replacement=True, generator=self.rng).T]
        self.blocks.append((rows, drawn))
        return drawn

    def requested(self, rows: int) -> Tensor:
        """Draws asked for, by row."""
        total = torch.zeros(rows, dtype=torch.int64)
        for asked, drawn in self.blocks:
            total[asked] += len(drawn)
        return total


def power(probabilities: Tensor, temperature: float) -> Tensor:
    """P^(1/T) / Z, through logarithms."""
    return (probabilities.log() / temperature).softmax(dim=-1)


UNLIKELY = 1e-6
"""A p-value that no stream of random numbers gives by chance; what is wrong is far below it."""


def chi_square_p_value(symbols: Tensor, expected: Tensor) -> float:
    observed = torch.bincount(symbols.flatten(), minlength=len(expected))
    return float(chisquare(observed.numpy(), (expected.double() / expected.sum() * len(symbols)).numpy()).pvalue)


@pytest.mark.parametrize("temperature", [1, 0.8, 0.5, 0.4, 0.3])
def test_exact_sampling_follows_the_power(temperature: float) -> None:
    rng = generator()
    probabilities = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    sample = exact_temperature(KnownSampler(probabilities, rng), 70_000, temperature, rng)
    expected = power(probabilities, temperature)
    assert sample.finished.all()
    assert chi_square_p_value(sample.symbols, expected) > UNLIKELY
    off_by_five_percent = expected * torch.tensor([1.05, 0.95, 0.95])
    assert chi_square_p_value(sample.symbols, off_by_five_percent) < UNLIKELY


def test_exact_sampling_of_rows_that_differ() -> None:
    distributions = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.6, 0.0]], dtype=torch.float64)
    rng = generator()
    sample = exact_temperature(KnownSampler(distributions, rng), 60_000, 0.4, rng)
    for row, distribution in enumerate(distributions[:2]):
        assert chi_square_p_value(sample.symbols[row::3], power(distribution, 0.4)) > UNLIKELY
    assert chi_square_p_value(sample.symbols[2::3], power(distributions[2, :2], 0.4)) > UNLIKELY


@pytest.fixture(params=[None, 3, 1])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as they are, and so short that most rounds and factories go on from block to block."""
    if request.param:
        monkeypatch.setattr(temperature_module, "FIRST_BLOCK", request.param)
        monkeypatch.setattr(temperature_module, "LARGEST_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("whole", "probabilities"), [(2, THREE), (3, THREE), (5, THREE), (40, torch.tensor([0.96, 0.04]))]
)
def test_blocks_read_the_stream_in_order(whole: int, probabilities: Tensor) -> None:
    """A loop over single draws finds the same, also for rounds that are longer than the first block."""
    rows, length = 50, 5000
    stream = torch.multinomial(probabilities.expand(rows, -1), length, replacement=True, generator=generator()).T
    position = torch.zeros(rows, dtype=torch.int64)

    def draw(asked: Tensor, count: int) -> Tensor:
        drawn = stream[position[asked] + torch.arange(count)[:, None], asked]
        position[asked] += count
        return drawn[..., None]

    sample = exact_temperature(draw, rows, 1 / whole, generator(), budget=length)
    for row, draws in enumerate(stream.T.tolist()):
        begin = next(start for start in range(0, length, whole) if len(set(draws[start : start + whole])) == 1)
        assert sample.symbols[row].item() == draws[begin]
        assert sample.draws[row].item() == begin + whole


@pytest.mark.parametrize(
    ("temperature", "probabilities", "rows"),
    [
        (1, THREE, 100),
        (0.8, THREE, 20_000),
        (0.4, THREE, 20_000),
        (1 / 3, THREE, 20_000),
        (0.8, torch.ones(400).double() / 400, 2000),  # factories as long as several blocks
        (0.55, torch.ones(60).double() / 60, 2000),
        (0.03, torch.tensor([0.97, 0.03]).double(), 2000),  # rounds longer than the first block
    ],
)
def test_mean_draws(temperature: float, probabilities: Tensor, rows: int) -> None:
    rng = generator()
    draws = exact_temperature(KnownSampler(probabilities, rng), rows, temperature, rng, budget=10**6).draws.double()
    standard_error = draws.std().item() / math.sqrt(rows)
    assert abs(draws.mean().item() - expected_draws(probabilities, temperature)) <= 5 * standard_error + 1e-6


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("temperature", [0.8, 0.4])
def test_factories_go_on_from_block_to_block(temperature: float) -> None:
    rng = generator()
    sample = exact_temperature(KnownSampler(THREE, rng), 10_000, temperature, rng)
    assert chi_square_p_value(sample.symbols, power(THREE, temperature)) > UNLIKELY
    draws = sample.draws.double()
    standard_error = draws.std().item() / 100
    assert abs(draws.mean().item() - expected_draws(THREE, temperature)) <= 5 * standard_error


@pytest.mark.parametrize("temperature", [math.nextafter(1 / 3, 0), 1 / 3, math.nextafter(1 / 3, 1)])
def test_rounding_of_the_exponent_starts_no_factory(temperature: float) -> None:
    rng = generator()
    assert (exact_temperature(KnownSampler(THREE, rng), 1000, temperature, rng).draws % 3 == 0).all()
    assert expected_draws(THREE, temperature) == pytest.approx(3 / (THREE**3).sum().item())


@pytest.mark.parametrize("temperature", [1, 0.8, 0.5, 0.4, 0.3])
def test_expected_draws_agrees_with_the_series(temperature: float) -> None:
    """Term by term: no closed form of the factory's bias or of its mean number of draws."""
    whole = math.floor(1 / temperature)
    fraction = 1 / temperature - whole
    per_round, success = float(whole), 0.0
    for probability in THREE.tolist():
        going_on = 1.0
        for draws in range(1, 500 if fraction else 1):
            per_round += probability**whole * going_on
            success += probability**whole * going_on * probability
            going_on *= (1 - probability) * (1 - fraction / draws)
        success += 0 if fraction else probability**whole
    assert expected_draws(THREE, temperature) == pytest.approx(per_round / success, rel=1e-9)


def test_expected_draws_of_flat_and_of_certain_distributions() -> None:
    assert expected_draws(torch.full((10,), 0.1).double(), 1 / 3) == pytest.approx(300)
    assert expected_draws(torch.tensor([1.0, 0.0]), 0.4) == 3
    assert expected_draws(torch.full((10,), 0.1), 1e-300) == math.inf


def test_draws_are_asked_for_in_blocks() -> None:
    rng = generator()
    draw = KnownSampler(torch.ones(1000), rng)
    sample = exact_temperature(draw, 20, 0.5, rng, budget=100_000)
    most = int(sample.draws.max())
    assert most > 4000
    assert len(draw.blocks) < 10 + most / LARGEST_BLOCK
    unused = draw.requested(20) - sample.draws
    assert ((unused >= 0) & (unused < LARGEST_BLOCK)).all()


@pytest.mark.parametrize("sampler", [exact_temperature, batch_temperature])
def test_temperature_one_is_plain_sampling(sampler: Callable[..., TemperatureSample]) -> None:
    draw = KnownSampler(THREE, generator())
    sample = sampler(draw, 100, 1, generator(1))
    assert torch.equal(sample.symbols, KnownSampler(THREE, generator())(torch.arange(100), 1)[0])
    assert torch.equal(sample.draws, torch.ones(100, dtype=torch.int64))
    assert torch.equal(draw.requested(100), sample.draws)
    assert sample.finished.all() and sample.exact


@pytest.mark.parametrize("sampler", [exact_temperature, batch_temperature])
def test_same_seed_same_result(sampler: Callable[..., TemperatureSample]) -> None:
    first, again, other = (
        sampler(KnownSampler(THREE, rng), 200, 0.4, rng) for rng in (generator(1), generator(1), generator(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.symbols, other.symbols)


@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.3])
def test_batch_sampling_approaches_the_power(temperature: float) -> None:
    probabilities = 1 / torch.arange(1, 13).double()
    expected = power(probabilities, temperature)
    earlier = math.inf
    for draws, rows in ((6, 20_000), (20, 20_000), (200, 3000), (1000, 1500)):
        rng = generator()
        sample = batch_temperature(KnownSampler(probabilities, rng), rows, temperature, rng, draws=draws)
        assert not sample.finished.any()
        assert (sample.draws == draws).all()
        frequencies = torch.bincount(sample.symbols.flatten(), minlength=12) / rows
        distance = (frequencies - expected).abs().sum().item() / 2
        noise = (expected * (1 - expected) / rows).sqrt().sum().item()  # 2.5 times what exact sampling would show
        assert distance < max(earlier / 1.5, noise)
        assert draws > 6 or distance > noise
        earlier = distance
    assert distance < noise


def chosen_among(samples: Tensor, temperature: float) -> Tensor:
    """Symbols [rows, size] that the batch sampler takes where its draws are ``samples`` [draws, rows, size]."""
    draws, rows, _ = samples.shape

    def draw(numbers: Tensor, count: int) -> Tensor:
        return samples[:count, numbers]

    return batch_temperature(draw, rows, temperature, generator(), draws=draws).symbols


@pytest.mark.parametrize(
    ("temperature", "weights"),
    [
        (0.5, [binom(4, 2), binom(2, 2), 0]),
        (0.4, [binom(4, 2.5), binom(2, 2.5), 0]),
        (0.8, [binom(4, 1.25), binom(2, 1.25), binom(1, 1.25)]),
        (1 / 3, [1, 0, 0]),
        (1e-20, [1, 0, 0]),
        (1e-300, [1, 0, 0]),
        (5e-324, [1, 0, 0]),
    ],
)
def test_batch_weights_are_binomial_coefficients(temperature: float, weights: list[float]) -> None:
    batch = torch.tensor([0, 1, 0, 2, 0, 1, 0])
    rows = 20_000
    chosen = chosen_among(batch[:, None, None].expand(-1, rows, 1), temperature).squeeze(1)
    possible = [symbol for symbol, weight in enumerate(weights) if weight]
    assert set(chosen.tolist()) == set(possible)
    if len(possible) > 1:
        assert chi_square_p_value(chosen, torch.tensor(weights).double()[possible]) > UNLIKELY


@pytest.mark.parametrize("temperature", [0.1, 0.15, 0.8, 1e-300])
def test_batch_sampling_falls_back_when_nothing_repeats(temperature: float) -> None:
    samples = torch.arange(5).view(5, 1, 1).expand(5, 10_000, 1)
    assert chi_square_p_value(chosen_among(samples, temperature).squeeze(1), torch.ones(5)) > UNLIKELY


def test_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        chosen_among(torch.zeros(0, 3, 1), 0.5)


@pytest.mark.parametrize(
    ("temperature", "reached"),
    [(1.0, [True] * 4), (0.7, [True] * 4), (0.5, [True, True, True, False]), (0.3, [True, True, False, False])],
)
def test_a_low_temperature_is_reached_where_draws_repeat(temperature: float, reached: list[bool]) -> None:
    """Of four draws four, three, two and one are alike; 1 / T = 2 asks for two of them, 3.33 for three."""
    drawn = torch.tensor([[7, 1, 1, 1], [7, 1, 2, 2], [7, 1, 1, 3], [7, 5, 2, 4]])[..., None]

    def draw(rows: Tensor, count: int) -> Tensor:
        return drawn[:count, rows]

    found = batch_temperature(draw, 4, temperature, generator(), draws=4)
    assert found.reached.tolist() == reached
    if temperature < 1:
        # The budget is out at once.
        fallen_back = exact_temperature(draw, 4, temperature, generator(), budget=1, fallback_draws=4)
        assert fallen_back.reached.tolist() == reached


@pytest.mark.parametrize("temperature", [0.5, 0.8])
@pytest.mark.parametrize("sampler", [exact_temperature, batch_temperature])
def test_symbols_that_agree_in_a_prefix_differ(sampler: Callable[..., TemperatureSample], temperature: float) -> None:
    symbols = torch.tensor([[1, 2, 3], [1, 2, 4], [9, 2, 3]])
    probabilities = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    rng = generator()
    sample = sampler(KnownSampler(probabilities, rng, symbols), 3000, temperature, rng)
    numbers = (sample.symbols[:, None] == symbols).all(dim=-1).long().argmax(dim=-1)
    assert torch.equal(symbols[numbers], sample.symbols)
    assert chi_square_p_value(numbers, power(probabilities, temperature)) > UNLIKELY


def test_symbols_that_share_no_token_are_not_taken_for_one() -> None:
    seen = torch.tensor([[0, 1], [0, 1], [2, 0], [2, 0], [1, 1], [1, 1], [1, 1]])
    assert chosen_among(seen[:, None], 1e-9).tolist() == [[1, 1]]


def test_a_round_as_long_as_the_budget_is_begun() -> None:
    sample = exact_temperature(KnownSampler(torch.ones(1), generator()), 2, 1 / 300, generator(), budget=300)
    assert sample.draws.tolist() == [300, 300]


def test_long_rounds_have_factories_too() -> None:
    # 1/T = 150.5, so T^-1 - 1 = 149.5.
    expected = (150 + (THREE**149.5).sum()) / (THREE**150.5).sum()
    assert expected_draws(THREE, 2 / 301) == pytest.approx(expected.item())


def test_the_default_budget_and_batch() -> None:
    never_the_same = KnownSampler(torch.ones(1_000_000), generator(), torch.arange(1_000_000)[:, None])
    with pytest.raises(CalmError, match="the budget of 20000 draws"):
        exact_temperature(never_the_same, 1, 1e-3, generator())
    assert never_the_same.requested(1).tolist() == [20_000]
    assert [len(drawn) for _, drawn in never_the_same.blocks[:8]] == [16, 32, 64, 128, 256, 512, 1024, 1024]
    assert batch_temperature(KnownSampler(THREE, generator()), 2, 0.5, generator()).draws.tolist() == [200, 200]


def test_an_exhausted_budget_says_what_to_do() -> None:
    probabilities = torch.stack([torch.ones(5000) / 5000, torch.eye(5000)[0]])
    draw = KnownSampler(probabilities, generator())
    with pytest.raises(
        CalmError, match=r"temperature 0\.25 .* 300 draws left 2 of 4 rows .* higher .* larger .* batch"
    ) as raised:
        exact_temperature(draw, 4, 0.25, generator(), budget=300)
    assert "\n" not in str(raised.value)
    assert draw.requested(4).tolist() == [300, 16, 300, 16]


@pytest.mark.parametrize("temperature", [1 / 301, 1e-9, 1e-300, 5e-324])
def test_rounds_longer_than_the_budget_are_never_begun(temperature: float) -> None:
    draw = KnownSampler(THREE, generator())
    with pytest.raises(CalmError, match="300 draws left 4 of 4 rows"):
        exact_temperature(draw, 4, temperature, generator(), budget=300)
    assert not draw.blocks
    sample = exact_temperature(draw, 4, temperature, generator(), budget=300, fallback_draws=50)
    assert sample.draws.tolist() == [50] * 4
    assert not sample.finished.any()


FREQUENT_AND_RARE = torch.cat([torch.tensor([0.2]), torch.full((1000,), 0.8 / 1000)]).double()


def out_of_budget(temperature: float, budget: int | None, rows: int = 20_000) -> tuple[TemperatureSample, Tensor]:
    rng = generator()
    draw = KnownSampler(FREQUENT_AND_RARE, rng)
    sample = exact_temperature(draw, rows, temperature, rng, budget=budget, fallback_draws=20)
    return sample, power(FREQUENT_AND_RARE, temperature)


def test_a_budget_chooses_among_symbols_where_the_power_is_not_whole() -> None:
    sample, target = out_of_budget(0.8, 400)
    frequent, late = (sample.symbols == 0).flatten().double(), 1 - sample.finished.double().mean().item()
    assert 0.05 < late < 0.5
    in_time = frequent[sample.finished].mean().item()
    assert in_time > target[0] + 0.1
    assert not sample.exact
    # Of all rows it still holds that they are no farther from the target than is the share of those not done in time.
    assert abs(frequent.mean().item() - target[0]) < late + 0.02
    free, _ = out_of_budget(0.8, None, 500)
    assert free.exact and free.finished.all()
    share = (free.symbols == 0).double().mean().item()
    assert share == pytest.approx(target[0].item(), abs=5 * math.sqrt(0.25 / 500))


def test_a_budget_does_not_choose_where_the_power_is_whole() -> None:
    sample, target = out_of_budget(0.5, 40)
    assert 0.2 < sample.finished.double().mean() < 0.9
    assert sample.exact
    frequent = (sample.symbols[sample.finished] == 0).double()
    error = math.sqrt(target[0] * (1 - target[0]) / len(frequent))
    assert frequent.mean().item() == pytest.approx(target[0].item(), abs=5 * error)


def test_the_batch_stands_in_for_rows_out_of_budget() -> None:
    probabilities = torch.stack([torch.ones(5000) / 5000, torch.eye(5000)[7]])
    draw = KnownSampler(probabilities, generator())
    sample = exact_temperature(draw, 6, 0.25, generator(), budget=300, fallback_draws=20)
    assert sample.finished.tolist() == [False, True] * 3
    assert sample.draws.tolist() == [320, 4] * 3
    assert sample.symbols[1::2].flatten().tolist() == [7] * 3
    rows, fallback = draw.blocks[-1]
    assert rows.tolist() == [0, 2, 4]
    assert (fallback == sample.symbols[::2]).all(dim=-1).any(dim=0).all()


@given(
    temperature=st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 1 / 3, 0.1, 1 - 1e-12, 1e-9, 1e-300, 5e-324]),
    probabilities=st.integers(1, 5000).map(torch.ones)
    | st.lists(st.floats(0, 1), min_size=1, max_size=8).map(lambda masses: torch.tensor([1.0, *masses])),
    seed=st.integers(0, 2**60),
    budget=st.integers(1, 2000),
    draws=st.integers(1, 50),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_temperature_ends_with_a_drawn_symbol(
    temperature: float, probabilities: Tensor, seed: int, budget: int, draws: int
) -> None:
    rows = 3
    symbols = torch.stack([torch.arange(len(probabilities)) % 7, torch.arange(len(probabilities))], dim=-1)

    def check(sample: TemperatureSample, draw: KnownSampler) -> None:
        for row, symbol in enumerate(sample.symbols):
            seen = torch.cat([drawn[:, asked == row].flatten(0, 1) for asked, drawn in draw.blocks])
            assert (seen == symbol).all(dim=-1).any()
        assert (sample.draws >= 1).all()
        assert (sample.draws <= draw.requested(rows)).all()

    rng = generator(seed)
    draw = KnownSampler(probabilities, rng, symbols)
    sample = exact_temperature(draw, rows, temperature, rng, budget=budget, fallback_draws=draws)
    check(sample, draw)
    assert (draw.requested(rows) <= torch.where(sample.finished, budget, budget + draws)).all()
    draw = KnownSampler(probabilities, rng, symbols)
    sample = batch_temperature(draw, rows, temperature, rng, draws=draws)
    check(sample, draw)
    assert torch.equal(sample.draws, draw.requested(rows))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_impossible_temperatures(temperature: float) -> None:
    draw = KnownSampler(THREE, generator())
    calls: list[Callable[[], object]] = [
        lambda: exact_temperature(draw, 2, temperature, generator()),
        lambda: batch_temperature(draw, 2, temperature, generator()),
        lambda: expected_draws(THREE, temperature),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="allowed is 0 < temperature <= 1"):
            call()
