import math

import pytest
import torch

from calm_core.energy_head import energy_loss
from calm_core.energy_score import energy_score
from calm_core.head import HeadObjective


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_formula_written_out(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    targets = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)
    score = energy_score(samples, targets, alpha)
    for position in range(3):
        x, y = samples[:, position], targets[:, position]
        fidelity = 2 / 20 * sum((a - b).norm() ** alpha for a in x for b in y)
        diversity = 1 / 20 * sum((x[n] - x[k]).norm() ** alpha for n in range(5) for k in range(5) if n != k)
        assert score.fidelity[position].item() == pytest.approx(fidelity.item(), rel=1e-9)
        assert score.diversity[position].item() == pytest.approx(diversity.item(), rel=1e-9)


def test_expectation_of_normals() -> None:
    # X ~ N(0, 1), Y ~ N(0, s^2): E|X - Y| = sqrt(2 (1 + s^2) / pi), E|X - X'| = 2 / sqrt(pi).
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(3, 100_000, 1, generator=generator)
    targets = 0.5 * torch.randn(2, 100_000, 1, generator=generator)
    values = torch.sub(*energy_score(samples, targets))
    exact = 2 * math.sqrt(2 * 1.25 / math.pi) - 2 / math.sqrt(math.pi)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * error


def test_the_true_distribution_scores_best() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(1, 50_000, 2, generator=generator)
    noise = torch.randn(8, 50_000, 2, generator=generator)
    scores = [torch.sub(*energy_score(shift + scale * noise, targets)).mean()
              for shift, scale in [(0.0, 1.0), (0.5, 1.0), (0.0, 0.6), (0.0, 1.6)]]  # fmt: skip
    assert min(scores) == scores[0]


def test_gradient_is_finite_where_samples_coincide() -> None:
    for alpha in (0.5, 1.0):
        samples = torch.ones(3, 2, 4, requires_grad=True)
        score = energy_score(samples, torch.ones(2, 2, 4), alpha)
        torch.sub(*score).sum().backward()
        assert samples.grad is not None
        assert torch.equal(samples.grad, torch.zeros_like(samples))


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="2 samples"):
        energy_score(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="alpha is 2"):
        energy_score(torch.zeros(2, 1, 1), torch.zeros(1, 1, 1), 2)


def test_spaces_add_their_scores() -> None:
    generator = torch.Generator().manual_seed(4)
    samples = torch.randn(4, 6, 5, generator=generator, requires_grad=True)
    targets = torch.randn(3, 6, 5, generator=generator)
    plain = energy_loss(samples, targets, HeadObjective())
    # Two parts of the tripled latents: their energy is three times the latents' own.
    objective = HeadObjective(spaces=(lambda x: torch.stack([3 * x, 3 * x], dim=-2),), scored_targets=3)
    tripled = energy_loss(samples, targets, objective)
    torch.testing.assert_close(tripled.total, 4 * plain.total)
    for name, term in plain.terms.items():
        torch.testing.assert_close(tripled.terms[name], 4 * term)
    torch.testing.assert_close(plain.total, plain.terms["fidelity"] - plain.terms["diversity"])
