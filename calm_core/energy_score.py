"""The energy score: a strictly proper rule that needs samples alone (paper, section 3, "energy loss").

For alpha in (0, 2), 2 E|x - y|^alpha - E|x - x'|^alpha is least, in expectation over y, when x is
distributed as y. The score knows nothing of where samples come from, so it applies in any space.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
    count = samples.shape[0]
    if count < 2:
        raise ValueError(f"the energy score needs 2 samples a position or more, got {count}")
    if not 0 < alpha < 2:
        raise ValueError(f"alpha is {alpha}; the energy score is strictly proper for 0 < alpha < 2")
    samples, targets = samples.transpose(0, 1), targets.transpose(0, 1)
    to_targets = _distances(samples, targets, alpha)
    between_samples = _distances(samples, samples, alpha)
    return EnergyScore(
        fidelity=2 * to_targets.mean(dim=(1, 2)),
        diversity=between_samples.sum(dim=(1, 2)) / (count * (count - 1)),
    )


def _distances(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """|x - y|^alpha for every pair, [positions, N, M]; gradient 0 where x = y."""
    # Exact differences: |x|^2 + |y|^2 - 2 x.y would cancel where samples lie close together.
    distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    if alpha == 1:
        return distances
    apart = distances > 0
    return torch.where(apart, torch.where(apart, distances, 1).pow(alpha), 0)
