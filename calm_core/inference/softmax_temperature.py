"""Temperature where each latent says the probability of every patch: P^(1/T) / Z from a few latents, 0 < T <= 1.

The model is another one than the paper's, whose decoder takes the most probable token of each position. Here tokens
are drawn from the decoder's softmax, so that P(x) = E_z p(x | z), p(x | z) = prod_k p_k(x_k | z). Both have the same
latents and a different P, and are sharpened each towards its own P^(1/T) / Z.

The paper's batch approximation counts pairs of equal draws among N: at 1/T = 2 a symbol's weight is C(c, 2), and where
P is flat no pair agrees. With M independent latents z_j and p_j = p(. | z_j) the expected number of agreeing pairs,
given the latents, is known: two symbols, one from each of z_j and z_l, are equal with probability

    S_jl = sum_x p_j(x) p_l(x) = prod_k sum_v p_jk(v) p_lk(v),

a product of K scalar products, since positions are independent given z; and equal ones are then distributed as
p_j p_l / S_jl, position by position. So for 1/T = 2 a pair j < l is chosen with weight S_jl and the symbol drawn from
p_j p_l / S_jl: its distribution is E[A(x) / sum_y A(y)] with A(x) = sum_{j<l} p_j(x) p_l(x), and
E[A(x)] = C(M, 2) P(x)^2, because z_j and z_l are independent. This is the Rao-Blackwell form of counting: the same
expectations of numerator and denominator, each with a smaller variance, and some pair always agrees best. What remains
is the bias of the ratio, of order 1/M, which vanishes as M grows; for few latents it is not always the smaller one
(docs/method.md measures both).

Other powers, with log P(x) estimated by the latents that did not propose x, so that proposal and estimate are
independent:
- 1/T > 2: M pairs are drawn by S_jl, a candidate from each, and one of them is chosen with weight P_{-jl}(x)^(1/T - 2);
- 1 < 1/T < 2: a candidate from each latent, chosen with weight P_{-j}(x)^(1/T - 1).
The estimates are means over latents, hence without bias where the remaining power is 1 (T = 1/3); everything else has a
further bias of order 1/M. At T = 1 one latent gives one exact draw.

What it costs: M latents, their logits and softmax once, and M^2 K V multiplications for S, few beside the logits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calm_core.evaluation.continuations import sample_tokens
from calm_core.inference.temperature import TemperatureSample
from calm_core.runtime.float64 import float64_device
from calm_core.runtime.row_generators import Generators, of_rows, uniform

LogitSampler = Callable[[Tensor, int], Tensor]
"""draw(rows, count): logits of p(. | z) of ``count`` independent latents, [count, len(rows), K, vocabulary], for each
context number in ``rows`` [n] int64, which are on the device of the generator that the algorithm has."""

LARGEST_POWER = 1e9
"""Beyond it only the largest weight is left; a finite one keeps 0 * infinity out."""

LEAST_LATENTS = 3
"""Two propose a symbol, and another one says how probable it is."""


def softmax_temperature(
    draw: LogitSampler,
    rows: int,
    temperature: float,
    generator: Generators,
    *,
    latents: int,
    rows_at_once: int | None = None,
) -> TemperatureSample:
    """One symbol roughly from P^(1 / temperature) / Z for each context number 0 .. ``rows`` - 1, from ``latents`` each.

    ``rows_at_once`` bounds memory: logits of so many rows are there together. At temperature 1 the draw is exact and
    takes one latent. ``draws`` of the result counts latents; ``finished`` and ``exact`` are false below temperature 1.

    Raises:
        ValueError: ``temperature`` is outside (0, 1], or ``latents`` below 3.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature is {temperature}; allowed is 0 < temperature <= 1")
    if latents < LEAST_LATENTS:
        raise ValueError(f"latents are {latents}; {LEAST_LATENTS} or more are needed")
    plain = temperature == 1
    count = 1 if plain else latents
    numbers = torch.arange(rows, device=generator.device)
    symbols = [
        _symbols(draw(some, count).float().transpose(0, 1), 1 / temperature, of_rows(generator, some))
        for some in numbers.split(rows_at_once or max(1, rows))
    ]
    used = torch.full_like(numbers, count)
    finished = torch.full_like(numbers, plain).bool()
    return TemperatureSample(torch.cat(symbols), used, finished, plain, reached=torch.ones_like(finished))


def _symbols(logits: Tensor, power: float, generator: Generators) -> Tensor:
    """One symbol [rows, K] a row of ``logits`` [rows, latents, K, vocabulary]."""
    probabilities = logits.softmax(dim=-1)
    if power == 1:
        return sample_tokens(probabilities[:, 0], generator)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    latents = logits.shape[1]
    own = torch.eye(latents, dtype=torch.bool, device=logits.device)
    if power < 2:
        candidates = sample_tokens(probabilities, generator)
        return _chosen(candidates, probabilities, own.expand(len(logits), -1, -1), power - 1, generator)
    first, second = torch.triu_indices(latents, latents, 1, device=logits.device)
    of_pairs = _log_agreement(probabilities)[:, first, second]
    proposals = 1 if power == 2 else latents
    pairs = _drawn(of_pairs, proposals, generator)
    first, second = first[pairs], second[pairs]
    # By logits: a product of probabilities that hardly overlap would be zero everywhere.
    candidates = sample_tokens((logits[rows, first] + logits[rows, second]).softmax(dim=-1), generator)
    return _chosen(candidates, probabilities, own[first] | own[second], power - 2, generator)


def _chosen(
    candidates: Tensor, probabilities: Tensor, proposers: Tensor, power: float, generator: Generators
) -> Tensor:
    """One [rows, K] of ``candidates`` [rows, candidates, K], with weight P^``power``.

    P is the mean over latents of ``probabilities`` [rows, latents, K, vocabulary], multiplied over positions, without
    the latents that ``proposers`` names, [rows, candidates, latents] bool.
    """
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    # log p(candidate | latent), [rows, latents, candidates].
    asked = candidates.transpose(1, 2)[:, None].expand(-1, probabilities.shape[1], -1, -1)
    of_latents = _log(probabilities.gather(-1, asked)).sum(dim=2)
    log_mean = of_latents.transpose(1, 2).masked_fill(proposers, -math.inf).logsumexp(dim=-1)
    # No power may make all weights infinite; only differences count.
    weights = (log_mean - log_mean.amax(dim=1, keepdim=True)) * min(power, LARGEST_POWER)
    chosen = _drawn(weights, 1, generator)[:, 0]
    return candidates[torch.arange(len(chosen), device=chosen.device), chosen]


def _log_agreement(probabilities: Tensor) -> Tensor:
    """log S_jl of every two latents of ``probabilities`` [rows, latents, K, vocabulary], [rows, latents, latents]."""
    of_position = probabilities.transpose(1, 2)
    return _log(of_position @ of_position.transpose(2, 3)).sum(dim=1)


def _log(probabilities: Tensor) -> Tensor:
    """The logarithm, finite: what float32 has rounded to zero counts as its least normal number."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def _drawn(log_weights: Tensor, count: int, generator: Generators) -> Tensor:
    """``count`` numbers a row, [rows, count], drawn by the weights of ``log_weights`` [rows, numbers]."""
    weights = log_weights.to(float64_device(log_weights.device)).double().softmax(dim=-1)
    # One running sum for all draws of a row; right=True never picks a weight of 0.
    sums = weights.cumsum(dim=-1)
    places = uniform((len(sums), count), generator) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp(max=sums.shape[1] - 1).to(log_weights.device)
