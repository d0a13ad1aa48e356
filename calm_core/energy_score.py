"""The energy score: a strictly proper rule that needs samples alone (paper, section 3, "energy loss").

For alpha in (0, 2), 2 E|x - y|^alpha - E|x - x'|^alpha is least, in expectation over y, when x is
distributed as y. The score knows nothing of where samples come from, so it applies in any space.

Notable: where targets are normal, as an autoencoder's posteriors are, ``energy_score_of_normal`` draws standard normal
vectors once for all positions and takes both e and -e. Each target has its distribution still, so the score stays
unbiased; distances become matrix products, and what e does to a gradient, -e undoes to first order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.precision import float32_products

SMALLEST_SQUARE = 1e-12
"""Below it a squared distance is rounding, and has no gradient."""


class EnergyScore(NamedTuple):
    """Both terms, one value a position [positions]; the score is ``fidelity - diversity``, lower is better."""

    fidelity: Tensor
    diversity: Tensor


def energy_score(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> EnergyScore:
    """Unbiased energy score of model ``samples`` against ``targets``.

    ``samples`` is [N, positions, size] with N >= 2, ``targets`` [M, positions, size], float32.
    fidelity = 2 / (N M) * sum |x_n - y_m|^alpha, diversity = 1 / (N (N - 1)) * sum_{n != k} |x_n - x_k|^alpha,
    |.| the Euclidean norm. No difference of two vectors is ever stored.

    Raises:
        ValueError: fewer than two samples, or ``alpha`` outside (0, 2).
    """
    _require_proper(samples, alpha)
    samples, targets = samples.transpose(0, 1), targets.transpose(0, 1)
    return EnergyScore(2 * _distances(samples, targets, alpha).mean(dim=(1, 2)), _diversity(samples, alpha))


def energy_score_of_normal(
    samples: Tensor, mean: Tensor, std: Tensor, noise: Tensor, alpha: float = 1.0
) -> EnergyScore:
    """``energy_score`` against the 2 m targets mean + std * e and mean - std * e, e each row of ``noise``.

    ``samples`` is [N, positions, size], ``mean`` and ``std`` [positions, size], ``noise`` [m, size] standard normal,
    float32, also under autocast. Over many draws of ``noise`` a gradient varies a few hundred times less than with as
    many independent targets (tests/calm_core/test_energy_score.py).

    Raises:
        ValueError: as ``energy_score``.
    """
    _require_proper(samples, alpha)
    with float32_products(samples.device):
        # |d - std e|^2 = |d|^2 + (std^2).(e^2) - 2 (std d).e for d = x - mean. The terms are of one size unless a
        # sample meets a target, which in many dimensions it does not; the clamp keeps rounding there above zero.
        deviations = samples - mean
        projections = 2 * (deviations * std) @ noise.T
        squares = deviations.square().sum(dim=-1, keepdim=True) + std.square() @ noise.square().T
        exponent = alpha / 2
        to_targets = [
            squared.clamp(min=SMALLEST_SQUARE).pow(exponent).mean(dim=(0, 2))
            for squared in (squares - projections, squares + projections)
        ]
    return EnergyScore(to_targets[0] + to_targets[1], _diversity(samples.transpose(0, 1), alpha))


def _require_proper(samples: Tensor, alpha: float) -> None:
    if len(samples) < 2:
        raise ValueError(f"the energy score needs 2 samples a position or more, got {len(samples)}")
    if not 0 < alpha < 2:
        raise ValueError(f"alpha is {alpha}; the energy score is strictly proper for 0 < alpha < 2")


def _diversity(samples: Tensor, alpha: float) -> Tensor:
    """Mean distance of two different ones of ``samples`` [positions, N, size], [positions]."""
    count = samples.shape[1]
    return _distances(samples, samples, alpha).sum(dim=(1, 2)) / (count * (count - 1))


def _distances(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """|x - y|^alpha for every pair, [positions, N, M]; gradient 0 where x = y."""
    # Exact differences: |x|^2 + |y|^2 - 2 x.y would cancel where samples lie close together.
    distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    if alpha == 1:
        return distances
    apart = distances > 0
    return torch.where(apart, torch.where(apart, distances, 1).pow(alpha), 0)
