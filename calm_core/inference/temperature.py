"""Temperature without likelihoods: symbols from P^(1/T) / Z, 0 < T <= 1, by samples of P alone (paper, section 5).

``exact_temperature`` rejects: exact, at a random cost. ``batch_temperature`` chooses among a fixed number of draws:
biased, at a known cost. Both see P only as a ``Sampler``, and a symbol is any run of token ids.

Write 1/T = n + a, n an integer, 0 <= a < 1. A round of the exact algorithm draws n samples and fails unless all are
equal; their common value x then passes a coin of bias P(x)^a, so that a round yields x with P(x)^n * P(x)^a. The
coin is a Bernoulli factory: for i = 1, 2, ... draw a sample; if it is x, heads; else with probability a/i, tails.

What it costs: a round succeeds with probability Z = sum_x P(x)^(1/T). The factory on p = P(x) goes on after k draws
with probability (1-p)^k * prod_{j<=k} (1 - a/j), and the sum of that over k >= 0 is the binomial series of
p^(a-1), its mean number of draws. A round therefore takes n + sum_x P(x)^n * P(x)^(a-1) draws on average, the sum
only for a > 0, and by Wald's identity E[draws] = (n + [a > 0] * sum_x P(x)^(1/T - 1)) / Z. Z falls as P gets flat or
T low, and the cost explodes: on V equally likely symbols it is V^(1/T - 1) * n for integer 1/T.

So a budget of draws ends the search. For integer 1/T a round takes n draws whatever they are, and what is found in time
is exact. Otherwise the factory takes longer the rarer x is, and what is found in time favours frequent symbols. No
other algorithm that sees draws alone and ends after N of them does better: its chances of returning x or y are
polynomials in P, whose ratio cannot be (P(x) / P(y))^(1/T) for 1/T that is no integer. What remains is a bound: up to
the end of the budget the draws are those of the exact algorithm, so what a row returns, from the approximation if it
has to, lies within a total variation of the target that is the probability of not being done in time.

What is counted and weighed is on the generator's device, where results are too, or on the CPU if that has no float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.evaluation.continuations import sample_tokens
from calm_core.runtime.float64 import float64_device
from calm_core.runtime.row_generators import Generators, of_rows, uniform

Sampler = Callable[[Tensor, int], Tensor]
"""draw(rows, count): ``count`` independent symbols, [count, len(rows), size] int64, for each context number in
``rows`` [n] int64, which are on the device of the generator that the algorithm has."""

FIRST_BLOCK, LARGEST_BLOCK = 16, 1024
"""Draws a row that ``exact_temperature`` asks for at a time; each block is twice as long as the one before."""


class TemperatureSample(NamedTuple):
    """One symbol a row, and what it took to find it."""

    symbols: Tensor
    """[rows, size] int64"""
    draws: Tensor
    """[rows] int64, samples of P that the algorithm used for each row"""
    finished: Tensor
    """[rows] bool, false where the symbol comes from the batch approximation"""
    exact: bool
    """Whether symbols of the finished rows are from P^(1 / T) / Z itself: not if a budget may have chosen among them"""
    reached: Tensor
    """[rows] bool, false where the approximation saw no symbol as often as T asks, and chose as at a higher one"""


def exact_temperature(
    draw: Sampler,
    rows: int,
    temperature: float,
    generator: Generators,
    *,
    budget: int | None = 20_000,
    fallback_draws: int | None = None,
) -> TemperatureSample:
    """One symbol from P^(1 / temperature) / Z for each context number 0 .. ``rows`` - 1, by rejection.

    A row may use ``budget`` samples of P, any number if that is None. One that needs more gets what
    ``batch_temperature`` chooses among ``fallback_draws`` fresh ones, if that is set; its ``draws`` count both. With a
    budget and a 1 / temperature that is no whole number, no row is exact, see above; each is then within
    P(not finished) of the target in total variation.

    Raises:
        ValueError: ``temperature`` is outside (0, 1].
        CalmError: a row needs more than ``budget`` samples, and ``fallback_draws`` is None.
    """
    whole, fraction = _split_exponent(temperature)
    device = float64_device(generator.device)
    open_rows = torch.arange(rows, device=device)
    draws, finished = torch.zeros_like(open_rows), torch.ones_like(open_rows, dtype=torch.bool)
    reached = finished.clone()
    limit = math.inf if budget is None else budget
    places, symbols = [], []  # rows that are done and their symbols, in the order in which they were
    # A round may begin in one block of draws and end in the next: begun, seen and skip carry it over.
    seen = skip = torch.zeros_like(open_rows)
    begun: Tensor | None = None
    asked, block = 0, 1 if temperature == 1 else FIRST_BLOCK
    while len(open_rows) and asked < limit and whole <= limit:
        fresh = draw(open_rows.to(generator.device), int(min(block, limit - asked))).to(device)
        stream = torch.cat([fresh[:1] if begun is None else begun, fresh])
        reading = _read_rounds(stream, seen, skip, int(whole), fraction, of_rows(generator, open_rows))
        value = stream[reading.place, torch.arange(len(open_rows), device=stream.device)]
        places.append(open_rows[reading.won])
        symbols.append(value[reading.won])
        draws[places[-1]] = asked + reading.end[reading.won]
        still = ~reading.won
        open_rows, seen, skip, begun = open_rows[still], reading.seen[still], reading.skip[still], value[still][None]
        asked += len(fresh)
        # Blocks grow, since rows that are still open are the expensive ones, and are bounded in memory.
        block = min(2 * block, LARGEST_BLOCK)
    if len(open_rows):
        if fallback_draws is None:
            raise CalmError(
                f"at temperature {temperature} the budget of {budget} draws left {len(open_rows)} of {rows} rows open; "
                "use a higher temperature, a larger budget or the batch sampler"
            )
        places.append(open_rows)
        samples = draw(open_rows.to(generator.device), fallback_draws)
        chosen, of_batch = _choose(samples, temperature, of_rows(generator, open_rows))
        symbols.append(chosen.to(device))
        draws[open_rows] = asked + fallback_draws
        finished[open_rows] = False
        reached[open_rows] = of_batch.to(device)
    where = generator.device
    found = torch.cat(symbols)[torch.cat(places).argsort()].to(where)
    exact = budget is None or whole_exponent(temperature)
    return TemperatureSample(found, draws.to(where), finished.to(where), exact, reached.to(where))


def batch_temperature(
    draw: Sampler, rows: int, temperature: float, generator: Generators, *, draws: int = 200
) -> TemperatureSample:
    """One symbol roughly from P^(1 / temperature) / Z for each context number 0 .. ``rows`` - 1.

    At temperature 1 it is one exact draw a row, else one of ``draws`` of them and ``finished`` all false. A symbol seen
    c times weighs C(c, 1/T), the number of ways to draw it 1/T times from the batch, by Gamma functions for
    1/T = n + a. It takes part if c >= n, where the weight is positive. Where no symbol was seen n times, n is lowered
    until one was, so a very low T means the most frequent symbol. Biased for finite N, exact in the limit. Generation
    does the same by ``equal_patches.candidates`` and ``batch_choice``, without decoding all draws.

    To ask for c >= n + a instead would drop at n = 1 all that was seen once as soon as anything was seen twice, and
    jump as 1/T leaves an integer. Mean total variation from the target on six known distributions, c >= n + a against
    c >= n: at T = 0.8 0.036 / 0.013 for N = 20 and 0.0035 / 0.0007 for N = 200; at T = 0.4 0.034 / 0.042 and 0.0050 /
    0.0052; at T = 0.3 0.064 / 0.068 and 0.0089 / 0.0089. So c >= n loses little for small N and wins much near T = 1.

    Raises:
        ValueError: ``temperature`` is outside (0, 1], or there are no draws to choose from.
    """
    plain = temperature == 1
    samples = draw(torch.arange(rows, device=generator.device), 1 if plain else draws)
    used = torch.full((rows,), len(samples), device=generator.device)
    chosen, reached = _choose(samples, temperature, generator)
    return TemperatureSample(chosen, used, torch.full_like(used, plain).bool(), plain, reached)


def expected_draws(probabilities: Tensor, temperature: float) -> float:
    """Mean draws that ``exact_temperature`` takes on P = ``probabilities`` [symbols] without a budget.

    Infinite where Z underflows. The module's docstring derives it.

    Raises:
        ValueError: ``temperature`` is outside (0, 1].
    """
    whole, fraction = _split_exponent(temperature)
    masses = probabilities.cpu().double()
    success = (masses ** (whole + fraction)).sum()
    factory = (masses ** (whole + fraction - 1)).sum() if fraction else torch.zeros_like(success)
    return ((whole + factory) / success).item()


def whole_exponent(temperature: float) -> bool:
    """Whether 1 / ``temperature`` is a whole number: what ``exact_temperature`` finds within a budget is exact then.

    Raises:
        ValueError: ``temperature`` is outside (0, 1].
    """
    return _split_exponent(temperature)[1] == 0


class _Reading(NamedTuple):
    """What a block of draws did for each row, all [rows]."""

    won: Tensor
    """Whether a round succeeded."""
    place: Tensor
    """Where in the stream the symbol of the last round stands."""
    end: Tensor
    """Draws of the block up to the success."""
    seen: Tensor
    """Draws so far of the round in progress, 0 if there is none."""
    skip: Tensor
    """Draws yet to come of a round that has failed already."""


def _read_rounds(
    stream: Tensor, seen: Tensor, skip: Tensor, whole: int, fraction: float, generator: Generators
) -> _Reading:
    """Follow the rounds of each row through ``stream`` [1 + count, rows, size].

    Place 0 holds the symbol of the round in progress (anything if there is none), places 1 .. count the fresh draws.
    What would become of a round is computed for every place where one could begin, place 0 standing for the one in
    progress; the rounds that do begin are then found by following the jumps from each lost round to the next.
    """
    count, rows = len(stream) - 1, stream.shape[1]
    places = torch.arange(count + 1, device=stream.device)[:, None]
    # The last place of the run of equal draws that each place belongs to: a round that begins there agrees so far.
    repeats = (stream[1:] == stream[:-1]).all(dim=-1)
    run_ends = torch.where(torch.nn.functional.pad(repeats, (0, 0, 0, 1)), count, places)
    run_ends[-1] = count
    run_ends = run_ends.flip(0).cummin(dim=0).values.flip(0)
    last = (places + whole - 1).repeat(1, rows)
    last[0] = (whole - seen).clamp(min=0)
    broken = run_ends < last.clamp(max=count)
    agreed = run_ends >= last
    heads = tails = last
    if fraction:
        heads = _next_occurrences(stream).gather(0, last.clamp(max=count))
        tails = last + _waits_for_tails(count, (seen - whole).clamp(min=0), fraction, generator)
    # On one draw heads come first: the coin is thrown only if the draw does not equal x.
    won = agreed & (heads <= tails.clamp(max=count))
    lost = broken | (agreed & (tails < heads) & (tails <= count))
    jumps = torch.where(lost, torch.where(broken, last, tails) + 1, places)

    def follow(start: Tensor) -> Tensor:
        return torch.where(start <= count, jumps.gather(0, start.clamp(max=count)), start)

    for _ in range(count.bit_length()):  # Each pass doubles how many jumps one step takes.
        jumps = follow(jumps)
    at = follow(torch.where(seen > 0, 0, 1 + skip)[None])
    inside = at.clamp(max=count)
    pending = at <= count
    return _Reading(
        won=(won.gather(0, inside) & pending)[0],
        place=inside[0],
        end=heads.gather(0, inside)[0],
        seen=torch.where(pending, count + 1 - at + torch.where(at == 0, seen - 1, 0), 0)[0],
        skip=(at - count - 1).clamp(min=0)[0],
    )


def _waits_for_tails(count: int, flipped: Tensor, fraction: float, generator: Generators) -> Tensor:
    """After how many draws each factory comes out tails if no draw is heads, [1 + count, rows]; ``count`` + 1 if later.

    The factory at place 0 has had ``flipped`` [rows] draws already, the others none. Only one factory reads any draw
    of a row in the end, so that they need no common coins.
    """
    rows, device = len(flipped), flipped.device
    draws = torch.arange(1, count + 1, device=device)
    # P(tails within k flips) = 1 - prod_{i <= k} (1 - a / i), inverted at a uniform number: one draw a factory.
    tails_by = 1 - (1 - fraction / draws.double()).cumprod(dim=0)
    quantiles = uniform((count + 1, rows), generator, row_dim=1)
    waits = torch.searchsorted(tails_by, quantiles, right=True) + 1
    coins = uniform((count, rows), generator, row_dim=1)
    tails = coins < fraction / (flipped + draws[:, None]).double()
    waits[0] = torch.where(tails, draws[:, None], count + 1).amin(dim=0)
    return waits


def _next_occurrences(stream: Tensor) -> Tensor:
    """Place where the symbol at each place of ``stream`` [places, rows, size] stands next; ``places`` if nowhere."""
    ordered, order = _symbol_ids(stream).sort(dim=0, stable=True)
    following = torch.where(ordered[1:] == ordered[:-1], order[1:], len(stream))
    return torch.full_like(order, len(stream)).scatter(0, order[:-1], following)


def _symbol_ids(symbols: Tensor) -> Tensor:
    """Numbers [N, rows] that are equal where ``symbols`` [N, rows, size] are; far faster than unique over rows."""
    ids, *others = (torch.unique(tokens, return_inverse=True)[1] for tokens in symbols.unbind(dim=-1))
    for tokens in others:
        ids = torch.unique(ids * (tokens.max() + 1) + tokens, return_inverse=True)[1]
    return ids


def batch_choice(samples: Tensor, temperature: float, generator: Generators) -> tuple[Tensor, Tensor]:
    """Of ``samples`` [N, rows, size] the index [rows] int64 of the one that ``batch_temperature`` takes in each row.

    And for each row whether some symbol was seen n times, [rows] bool; both where ``samples`` are.
    """
    whole, fraction = _split_exponent(temperature)
    if len(samples) == 0:
        raise ValueError("samples hold 0 draws a row; at least 1 is needed to choose from")
    ids = _symbol_ids(samples.to(float64_device(samples.device)))
    ids_by_row = ids * ids.shape[1] + torch.arange(ids.shape[1], device=ids.device)
    _, distinct, multiplicity = torch.unique(ids_by_row, return_inverse=True, return_counts=True)
    counts = multiplicity[distinct].T.double()
    # The fallback of the paper: n, n - 1, ... until some symbol was seen that often.
    lowered = counts.amax(dim=1, keepdim=True).clamp(max=whole)
    exponents = lowered + fraction
    # The clamp touches only symbols that take no part: the others have c - n - a > -1.
    remainder = (counts - exponents).clamp(min=-fraction)
    log_ways = torch.lgamma(counts + 1) - torch.lgamma(exponents + 1) - torch.lgamma(remainder + 1)
    # A symbol stands in the batch as often as it was seen, so each of its copies gets its share of the weight.
    weights = torch.where(counts >= lowered, log_ways - counts.log(), -torch.inf).softmax(dim=1)
    reached = (lowered.squeeze(1) == whole).to(samples.device)
    if isinstance(generator, torch.Generator) and weights.device.type == generator.device.type:
        return torch.multinomial(weights, 1, generator=generator).squeeze(1), reached
    # One call cannot draw by several generators, nor on the CPU, where the weights of a device without float64 are.
    return sample_tokens(weights, generator).to(samples.device), reached


def _choose(samples: Tensor, temperature: float, generator: Generators) -> tuple[Tensor, Tensor]:
    """The symbols [rows, size] that ``batch_choice`` names, and whether the temperature was reached, [rows] bool."""
    chosen, reached = batch_choice(samples, temperature, generator)
    return samples[chosen, torch.arange(len(chosen), device=samples.device)], reached


def _split_exponent(temperature: float) -> tuple[float, float]:
    """1/T as n and a, n >= 1 whole and possibly infinite, 0 <= a < 1; an a within 1e-9 of a whole number counts as it.

    Raises:
        ValueError: ``temperature`` is outside (0, 1].
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature is {temperature}; allowed is 0 < temperature <= 1")
    exponent = 1 / temperature
    if exponent >= 2**53:  # Beyond it every float is whole, and infinity has no floor.
        return exponent, 0.0
    whole = math.floor(exponent + 1e-9)
    fraction = exponent - whole
    return whole, fraction if fraction > 1e-9 else 0.0
