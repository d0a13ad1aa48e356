import math

import numpy as np
import pytest
import torch
from scoringrules import es_ensemble

from calm_core.autoencoder.model import Posterior
from calm_core.calm.energy_head import EnergyDraws, energy_loss
from calm_core.calm.energy_score import energy_score, energy_score_of_normal
from calm_core.calm.head import HeadObjective


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


@pytest.mark.parametrize("count", [2, 3, 8])
def test_another_library_agrees(count: int) -> None:
    # scoringrules' score is half of the paper's; its fair estimator leaves out pairs of a sample with itself, as here.
    generator = torch.Generator().manual_seed(7)
    samples = torch.randn(count, 6, 5, generator=generator, dtype=torch.float64)
    targets = 1 + torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    theirs = [
        es_ensemble(target.numpy(), samples.numpy(), m_axis=0, estimator="fair", backend="numpy") for target in targets
    ]
    expected = 2 * torch.tensor(np.mean(theirs, axis=0))
    torch.testing.assert_close(energy_score(samples, targets).total, expected, rtol=1e-12, atol=0)


def test_expectation_of_normals() -> None:
    # X ~ N(0, 1), Y ~ N(0, s^2): E|X - Y| = sqrt(2 (1 + s^2) / pi), E|X - X'| = 2 / sqrt(pi).
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(3, 100_000, 1, generator=generator)
    targets = 0.5 * torch.randn(2, 100_000, 1, generator=generator)
    values = energy_score(samples, targets).total
    exact = 2 * math.sqrt(2 * 1.25 / math.pi) - 2 / math.sqrt(math.pi)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 5 * error


def test_the_true_distribution_scores_best() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(1, 50_000, 2, generator=generator)
    noise = torch.randn(8, 50_000, 2, generator=generator)
    scores = [energy_score(shift + scale * noise, targets).total.mean()
              for shift, scale in [(0.0, 1.0), (0.5, 1.0), (0.0, 0.6), (0.0, 1.6)]]  # fmt: skip
    assert min(scores) == scores[0]


def normal_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(5, 40, 16, generator=generator).to(dtype).requires_grad_()
    mean = torch.randn(40, 16, generator=generator).to(dtype)
    std = (0.05 + 0.3 * torch.rand(40, 16, generator=generator)).to(dtype)
    return samples, mean, std, torch.randn(6, 16, generator=generator).to(dtype)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_shared_normal_targets_are_targets_like_others(alpha: float) -> None:
    samples, mean, std, noise = normal_case(torch.float64)
    both = torch.cat([noise, -noise])[:, None]
    expected = energy_score(samples, mean + std * both, alpha)
    expected.total.sum().backward()
    gradient, samples.grad = samples.grad, None
    again, mean, std, noise = normal_case(torch.float32)
    score = energy_score_of_normal(again, mean, std, noise, alpha)
    score.total.sum().backward()
    torch.testing.assert_close(score.fidelity.double(), expected.fidelity, rtol=1e-5, atol=0)
    torch.testing.assert_close(score.diversity.double(), expected.diversity, rtol=1e-5, atol=0)
    assert gradient is not None
    assert again.grad is not None
    assert (again.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_shared_normal_targets_are_unbiased_and_steadier() -> None:
    # A weight that all positions share, as in a head's last bias: the mean gradient over positions.
    samples, mean, std, _ = normal_case(torch.float32)
    generator = torch.Generator().manual_seed(6)

    def gradient(shared: bool) -> torch.Tensor:
        if shared:
            score = energy_score_of_normal(samples, mean, std, torch.randn(2, 16, generator=generator))
        else:
            score = energy_score(samples, mean + std * torch.randn(4, 40, 16, generator=generator))
        return torch.autograd.grad(score.total.mean(), samples)[0].sum(dim=(0, 1))

    independent, shared = (torch.stack([gradient(kind) for _ in range(600)]) for kind in (False, True))
    error = (independent.var(dim=0) / 600 + shared.var(dim=0) / 600).sqrt()
    assert ((independent.mean(dim=0) - shared.mean(dim=0)).abs() < 5 * error).all()
    assert shared.var(dim=0).mean() < 0.1 * independent.var(dim=0).mean()


def test_shared_normal_targets_of_no_spread() -> None:
    # A collapsed posterior met exactly: no distance, no gradient, nothing infinite.
    samples = torch.ones(3, 2, 4, requires_grad=True)
    score = energy_score_of_normal(samples, torch.ones(2, 4), torch.zeros(2, 4), torch.ones(2, 4))
    score.total.sum().backward()
    assert samples.grad is not None
    assert torch.equal(samples.grad, torch.zeros_like(samples))
    assert score.fidelity.max() <= 4e-6


def test_positions_in_blocks_and_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    samples = torch.randn(3, 5, 2, generator=draws).requires_grad_()
    mean, noise = torch.randn(5, 2, generator=draws), torch.randn(4, 2, generator=draws)
    std = torch.rand(5, 2, generator=draws) + 0.1
    targets = torch.cat([mean + std * noise[:, None], mean - std * noise[:, None]])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25])
    to_targets = 2 * (samples[:, None] - targets).norm(dim=-1).mean(dim=(0, 1))
    apart = torch.stack([(samples[n] - samples[k]).norm(dim=-1) for n, k in ((0, 1), (0, 2), (1, 2))]).mean(dim=0)
    expected = to_targets - apart
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), samples)
    monkeypatch.setattr("calm_core.calm.energy_score.BLOCK_VALUES", 12)  # blocks of two positions, the last of one
    for score in (energy_score(samples, targets), energy_score_of_normal(samples, mean, std, noise)):
        torch.testing.assert_close(score.total, expected)
        (gradient,) = torch.autograd.grad((weights * score.total).sum(), samples)
        torch.testing.assert_close(gradient, expected_gradient)


def test_rounding_at_a_normal_target_has_no_gradient() -> None:
    # The first sample lies on the targets up to rounding, so that it feels the second alone.
    samples = torch.tensor([[[3e-8, -3e-8]], [[3.0, 4.0]]], requires_grad=True)
    score = energy_score_of_normal(samples, torch.zeros(1, 2), torch.zeros(1, 2), torch.randn(4, 2))
    (gradient,) = torch.autograd.grad(score.total.sum(), samples)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([0.6, 0.8]), atol=1e-4, rtol=0)


def test_gradient_is_finite_where_samples_coincide() -> None:
    for alpha in (0.5, 1.0):
        samples = torch.ones(3, 2, 4, requires_grad=True)
        score = energy_score(samples, torch.ones(2, 2, 4), alpha)
        score.total.sum().backward()
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
    mean = torch.randn(6, 5, generator=generator)
    posterior = Posterior(mean, torch.full_like(mean, -torch.inf))
    draws = EnergyDraws(torch.empty(0), torch.randn(2, 5, generator=generator), torch.zeros(1, 6, 5))
    plain = energy_loss(samples, posterior, draws, HeadObjective())
    # Two parts of the tripled latents: their energy is three times the latents' own.
    objective = HeadObjective(spaces=(lambda x: torch.stack([3 * x, 3 * x], dim=-2),))
    tripled = energy_loss(samples, posterior, draws, objective)
    torch.testing.assert_close(tripled.total, 4 * plain.total)
    for name, term in plain.terms.items():
        torch.testing.assert_close(tripled.terms[name], 4 * term)
    torch.testing.assert_close(plain.total, plain.terms["fidelity"] - plain.terms["diversity"])
