"""Temperature without likelihoods: P^(1/T) from samples of P alone (paper, section 5, the batch approximation)."""

import torch
from torch import Tensor


def temperature_choice(samples: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One of N samples a row, so that symbols come out roughly in proportion to P^(1 / temperature).

    ``samples`` [N, rows, size] hold N independent draws of one symbol (``size`` token ids) for each row; the
    result is [rows, size]. A symbol seen c times weighs C(c, 1/T), the number of ways to draw it 1/T
    times from the batch, by Gamma functions where 1/T is no integer. Where no symbol was seen 1/T times, 1/T is
    lowered by one until one was. Biased for finite N, exact in the limit.

    Raises:
        ValueError: ``temperature`` is outside (0, 1].
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature is {temperature}; allowed is 0 < temperature <= 1")
    same = (samples[:, None] == samples[None]).all(dim=-1)
    counts = same.sum(dim=1).T.double()
    exponents = torch.full_like(counts[:, :1], 1 / temperature)
    most = counts.max(dim=1, keepdim=True).values
    exponents -= (exponents - most).clamp(min=0).ceil()
    log_ways = (
        torch.lgamma(counts + 1) - torch.lgamma(exponents + 1) - torch.lgamma((counts - exponents).clamp(min=0) + 1)
    )
    # A symbol stands in the batch as often as it was seen, so each of its copies gets its share of the weight.
    weights = torch.where(counts >= exponents, log_ways - counts.log(), -torch.inf).softmax(dim=1)
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return samples[chosen, torch.arange(samples.shape[1])]
