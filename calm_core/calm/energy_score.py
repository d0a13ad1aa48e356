"""The energy score: a strictly proper rule that needs samples alone (paper, section 3, "energy loss").

For alpha in (0, 2), 2 E|x - y|^alpha - E|x - x'|^alpha is least, in expectation over y, when x is
distributed as y. The score knows nothing of where samples come from, so it applies in any space.

Notable:
- diversity is a U-statistic over pairs of different samples, so the score is unbiased for any number of samples;
- where targets are normal, as an autoencoder's posteriors are, ``energy_score_of_normal`` shares standard normal draws
  between positions, in antithetic pairs e and -e. Each target keeps its distribution, so the score stays unbiased;
  distances become matrix products, and the first-order noise of the gradient cancels in each pair;
- the score is computed block by block of positions, with its gradient, while a block is in the processor's cache. The
  backward pass needs nothing but that gradient, which is as large as the samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.float32 import float32_products

SMALLEST_SQUARE = 1e-12
"""Below it a squared distance to a normal target is rounding, and has no gradient."""

BLOCK_VALUES = 1 << 19
"""Values of the samples of a block on a CPU."""


class EnergyScore(NamedTuple):
    """One value a position, each [positions]. ``total`` = ``fidelity`` - ``diversity``, lower is better; it alone has a
    gradient, and only for the samples."""

    total: Tensor
    fidelity: Tensor
    diversity: Tensor


class _Term(NamedTuple):
    """A part of the score in a block, [positions], and its gradient [N, positions, size]."""

    value: Tensor
    gradient: Tensor


def energy_score(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> EnergyScore:
    """Unbiased energy score of model ``samples`` against ``targets``.

    ``samples`` is [N, positions, size] with N >= 2, ``targets`` [M, positions, size], float32.
    fidelity = 2 / (N M) * sum |x_n - y_m|^alpha, diversity = 1 / (N (N - 1)) * sum_{n != k} |x_n - x_k|^alpha,
    |.| the Euclidean norm; a pair that coincides has gradient 0.

    Raises:
        ValueError: fewer than two samples, or ``alpha`` outside (0, 2).
    """

    def fidelity(block: Tensor, first: int) -> _Term:
        return _to_targets(block, targets[:, first : first + block.shape[1]], alpha)

    return _score(samples, fidelity, alpha)


def energy_score_of_normal(
    samples: Tensor, mean: Tensor, std: Tensor, noise: Tensor, alpha: float = 1.0
) -> EnergyScore:
    """``energy_score`` against the 2 m targets mean + std * e and mean - std * e, e each row of ``noise``.

    ``samples`` is [N, positions, size], ``mean`` and ``std`` [positions, size], ``noise`` [m, size] standard normal,
    float32, also under autocast. Over many draws of ``noise`` a gradient varies a few hundred times less than with as
    many independent targets (tests/calm_core/calm/test_energy_score.py).

    Raises:
        ValueError: as ``energy_score``.
    """
    noise_squares = noise.square().T

    def fidelity(block: Tensor, first: int) -> _Term:
        places = slice(first, first + block.shape[1])
        return _to_normal(block, mean[places], std[places], noise, noise_squares, alpha)

    return _score(samples, fidelity, alpha)


def _score(samples: Tensor, fidelity: Callable[[Tensor, int], _Term], alpha: float) -> EnergyScore:
    if len(samples) < 2:
        raise ValueError(f"the energy score needs 2 samples a position or more, got {len(samples)}")
    if not 0 < alpha < 2:
        raise ValueError(f"alpha is {alpha}; the energy score is strictly proper for 0 < alpha < 2")
    # Whether gradients are wanted is asked here: inside a Function's forward, grad mode is always off.
    return EnergyScore(*_BlockedScore.apply(samples, fidelity, alpha, torch.is_grad_enabled()))


class _BlockedScore(torch.autograd.Function):
    """Score of ``samples`` and, if ``train``, its gradient for the backward pass, block by block of positions."""

    @staticmethod
    def forward(
        ctx: Any, samples: Tensor, fidelity: Callable[[Tensor, int], _Term], alpha: float, train: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, positions, size = samples.shape
        # All positions at once would go through memory at each line of the terms; a block stays in the cache.
        at_once = rows_at_once(count * size, samples.device, BLOCK_VALUES)
        terms = samples.new_empty(2, positions)
        gradient = torch.empty_like(samples) if train else None
        # In bf16 the expanded squares of ``_to_normal`` would cancel to a few bits.
        with float32_products(samples.device):
            for first in range(0, positions, at_once):
                places = slice(first, first + at_once)
                block = samples[:, places]
                near, apart = fidelity(block, first), _between(block, alpha)
                terms[0, places], terms[1, places] = near.value, apart.value
                if gradient is not None:
                    torch.sub(near.gradient, apart.gradient, out=gradient[:, places])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        of_fidelity, of_diversity = terms
        ctx.mark_non_differentiable(of_fidelity, of_diversity)
        return of_fidelity - of_diversity, of_fidelity, of_diversity

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # The gradient per position is known since the forward pass; only the weight that the caller gives a position is
        # new.
        return gradient * gradients[0][:, None], None, None, None


def _to_targets(samples: Tensor, targets: Tensor, alpha: float) -> _Term:
    value, gradient = samples.new_zeros(samples.shape[1]), torch.zeros_like(samples)
    scale = 2 / (len(samples) * len(targets))
    # One target at a time, so that differences are as large as the samples and not M times as large.
    for target in targets:
        difference = samples - target
        distances = difference.norm(dim=-1)
        value += distances.pow(alpha).sum(dim=0)
        gradient.addcmul_(difference, _slopes(distances, alpha).unsqueeze(-1), value=scale)
    return _Term(scale * value, gradient)


def _to_normal(samples: Tensor, mean: Tensor, std: Tensor, noise: Tensor, noise_squares: Tensor, alpha: float) -> _Term:
    # |d - std e|^2 = |d|^2 + (std^2).(e^2) - 2 (std d).e for d = x - mean. The terms are of one size unless a
    # sample meets a target, which in many dimensions it does not; the clamp keeps rounding there above zero.
    deviations = samples - mean
    # The two products over the size are all that M targets cost: [N, positions, m].
    projections = (deviations * std) @ (2 * noise.T)
    squares = deviations.square().sum(dim=-1, keepdim=True) + std.square() @ noise_squares
    # 2 / (N M) with M = 2 m targets.
    scale = 1 / (len(samples) * len(noise))
    minus = (squares - projections).clamp_(min=SMALLEST_SQUARE).sqrt_()
    # In place, hence after ``minus``, which needs the squares as they were.
    plus = squares.add_(projections).clamp_(min=SMALLEST_SQUARE).sqrt_()
    value = scale * (minus.pow(alpha) + plus.pow(alpha)).sum(dim=(0, 2))
    minus, plus = (_slopes(distances, alpha, SMALLEST_SQUARE**0.5) for distances in (minus, plus))
    # With slopes s: sum of s- (d - std e) + s+ (d + std e) = d sum(s- + s+) + std sum((s+ - s-) e).
    along_noise = (plus - minus) @ noise
    gradient = deviations.mul_((minus + plus).sum(dim=-1, keepdim=True)).addcmul_(std, along_noise)
    return _Term(value, gradient.mul_(scale))


def _between(samples: Tensor, alpha: float) -> _Term:
    """Mean of |x - x'|^alpha over two different ones of ``samples``."""
    # Exact differences: |x|^2 + |y|^2 - 2 x.y would cancel where samples lie close together.
    count = len(samples)
    # Each pair is visited once and stands for both of its orders.
    scale = 2 / (count * (count - 1))
    value, gradient = samples.new_zeros(samples.shape[1]), torch.zeros_like(samples)
    # All pairs that lie ``step`` apart at once: N - 1 passes over memory, and no [N, N] differences.
    for step in range(1, count):
        difference = samples[step:] - samples[:-step]
        distances = difference.norm(dim=-1)
        value += distances.pow(alpha).sum(dim=0)
        difference *= _slopes(distances, alpha).unsqueeze(-1)
        gradient[step:] += difference
        gradient[:-step] -= difference
    return _Term(scale * value, gradient.mul_(scale))


def _slopes(distances: Tensor, alpha: float, nearest: float = 0.0) -> Tensor:
    """(d |v|^alpha / d v) / v = alpha * |v|^(alpha - 2), and 0 for |v| <= ``nearest``."""
    # At distance 0 the power is infinite; ``where`` drops it, which is safe as autograd never sees this line.
    return torch.where(distances > nearest, alpha * distances.pow(alpha - 2), 0)
