"""Generators that are keyed by what they are for."""

import torch

from calm_core.runtime.randomness import generator


def test_generators_depend_on_their_purpose_alone() -> None:
    def draw(*purpose: str | int) -> float:
        return torch.rand(1, generator=generator(*purpose)).item()  # type: ignore[arg-type]

    assert draw(0, "noise", 7) == draw(0, "noise", 7)
    assert len({draw(0, "noise", 7), draw(1, "noise", 7), draw(0, "noise", 8), draw(0, "data", 7)}) == 4
