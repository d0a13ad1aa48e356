"""The energy loss against its formula written out: 8 samples, 100 targets, L 128, 4096 positions, both passes.

The formula draws M normal targets a position and stores every difference of two vectors. What is compared includes
the draws on both sides; gradients are compared on the same draws.
"""

import torch
from torch import Tensor

from benchmarks.measure import ROUNDS, Result, median_ratio, medians, peak_memory, seconds_of
from calm_core.calm.energy_score import energy_score_of_normal

SAMPLES, TARGETS, LATENT, POSITIONS = 8, 100, 128, 4096


def energy_loss() -> list[Result]:
    """Speed, memory and agreement."""
    samples, mean, std = _case()
    generator = torch.Generator().manual_seed(1)

    def formula() -> Tensor:
        return written_out(samples, mean, std, _independent_noise(generator))

    def products() -> Tensor:
        return by_products(samples, mean, std, _shared_noise(generator))

    pairs = []
    for _ in range(ROUNDS):
        formula_seconds = seconds_of(formula)
        # Not timed: in it the allocator gives back the 5 GB that the formula took, which takes ten times as long.
        products()
        pairs.append((formula_seconds, seconds_of(products)))
    formula_seconds, seconds = medians(pairs)
    formula_bytes, bytes_ = peak_memory(_formula_once).added, peak_memory(_products_once).added
    noise = _shared_noise(generator)
    both = torch.cat([noise, -noise])[:, None].expand(-1, POSITIONS, -1)
    exact, ours = written_out(samples, mean, std, both), by_products(samples, mean, std, noise)
    error = float((ours - exact).norm() / exact.norm())
    shared = {"samples": SAMPLES, "targets": TARGETS, "latent_size": LATENT, "positions": POSITIONS}
    return [
        Result(
            "energy loss, forward and backward",
            "the formula written out with broadcast differences",
            median_ratio(pairs),
            "times as fast",
            ">=",
            10,
            {**shared, "seconds": seconds, "formula_seconds": formula_seconds},
        ),
        Result(
            "energy loss, peak memory",
            "the same",
            bytes_ / formula_bytes,
            "of its memory",
            "<=",
            0.1,
            {**shared, "bytes": bytes_, "formula_bytes": formula_bytes},
        ),
        Result(
            "energy loss, gradient on the same draws",
            "the same",
            error,
            "relative difference",
            "<=",
            1e-5,
            dict(shared),
        ),
    ]


def written_out(samples: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Gradient of the mean loss for ``samples`` [N, positions, latent], targets mean + std * noise [M, ..]."""
    samples = samples.detach().requires_grad_()
    targets = mean + std * noise
    fidelity = 2 * (samples[:, None] - targets[None]).norm(dim=-1).mean(dim=(0, 1))
    between = (samples[:, None] - samples[None]).norm(dim=-1)
    diversity = between.sum(dim=(0, 1)) / (SAMPLES * (SAMPLES - 1))
    (gradient,) = torch.autograd.grad((fidelity - diversity).mean(), samples)
    return gradient


def by_products(samples: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """The same as this project computes it, for ``noise`` [M / 2, latent] and its negative."""
    samples = samples.detach().requires_grad_()
    score = energy_score_of_normal(samples, mean, std, noise)
    (gradient,) = torch.autograd.grad(score.total.mean(), samples)
    return gradient


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(SAMPLES, POSITIONS, LATENT, generator=generator)
    mean = torch.randn(POSITIONS, LATENT, generator=generator)
    return samples, mean, 0.05 + 0.3 * torch.rand(POSITIONS, LATENT, generator=generator)


def _independent_noise(generator: torch.Generator) -> Tensor:
    return torch.randn(TARGETS, POSITIONS, LATENT, generator=generator)


def _shared_noise(generator: torch.Generator) -> Tensor:
    return torch.randn(TARGETS // 2, LATENT, generator=generator)


def _formula_once() -> None:
    generator = torch.Generator().manual_seed(1)
    written_out(*_case(), _independent_noise(generator))


def _products_once() -> None:
    generator = torch.Generator().manual_seed(1)
    by_products(*_case(), _shared_noise(generator))
