"""A training stops at the first step that is unsound, and at no other."""

import math
import re

import pytest
import torch

from calm_core.errors import CalmError
from calm_core.training.divergence import Divergence


def divergence_of(losses: list[float], norms: list[float] | None = None, saved: int = 0) -> Divergence:
    found = Divergence("calm", lambda step: f"text {step}", saved)
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        found.observe(step, torch.tensor(loss), torch.tensor(norm))
    return found


@pytest.mark.parametrize(
    ("losses", "first_loss"),
    [([], 1.0), ([3.0, 1e9], None), ([30.0, -500.0, 1.0], 3.0), ([30.0], -3.0), ([0.0], 0.0)],
)
def test_sound_losses(losses: list[float], first_loss: float | None) -> None:
    divergence_of(losses).require_none(first_loss)


@pytest.mark.parametrize(
    ("losses", "norms", "what"),
    [
        ([1.0, math.nan, math.inf], [1.0] * 3, "the loss is nan at step 2 (text 1)"),
        ([1.0, 1.0, -math.inf], [1.0] * 3, "the loss is -inf at step 3 (text 2)"),
        ([1.0, 1.0], [math.inf, 1.0], "the norm of the gradient is inf at step 1 (text 0)"),
        ([1.0, 1.0, 1.0], [1.0, 1e30, math.nan], "the norm of the gradient is nan at step 3 (text 2)"),
        ([30.0, 31.0, 99.0], [1.0] * 3, "the loss leaps to 31, from 3 at the beginning, at step 2 (text 1)"),
    ],
)
def test_the_first_unsound_step_is_named(losses: list[float], norms: list[float], what: str) -> None:
    with pytest.raises(CalmError, match=re.escape(f"calm: {what}; lower the learning rates or check that text")):
        divergence_of(losses, norms).require_none(3.0)


def test_the_checkpoint_before_is_named() -> None:
    found = divergence_of([math.nan], saved=40)
    found.saved = 60
    with pytest.raises(CalmError, match="at step 1 .*; the checkpoint after step 60 is kept; lower"):
        found.require_none(None)


def test_steps_are_looked_at_once() -> None:
    found = divergence_of([50.0])
    found.require_none(None)
    found.require_none(1.0)  # the step before was sound by what was known then
    found.observe(1, torch.tensor(50.0), torch.tensor(1.0))
    with pytest.raises(CalmError, match="at step 2"):
        found.require_none(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    found = divergence_of([])
    found.require_finite([torch.ones(3), torch.tensor(1)], 5)
    with pytest.raises(CalmError, match="no longer finite at step 5 \\(text 4\\)"):
        found.require_finite([torch.ones(3), torch.tensor([1.0, value])], 5)
