"""Where the random numbers of a training step come from: one stream a row of the batch, and names within it.

A loss is a pure function of its draws. What draws them knows a batch's rows and nothing of steps, seeds and devices:
a training passes ``runtime.randomness.StepStreams``, and where no training is, ``GeneratorDraws`` serve.
"""

from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Numbers by name: another name, other numbers; the same name, the same ones."""

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[rows, *shape] float32 in [0, 1)."""

    def normal(self, name: str, *shape: int) -> Tensor:
        """[rows, *shape] float32, standard normal."""

    def shared_normal(self, name: str, *shape: int) -> Tensor:
        """[*shape] float32, standard normal: the same for all rows of the batch."""


class GeneratorDraws:
    """The next numbers of ``generator`` for ``rows`` rows, on its device; each call draws anew, whatever the name."""

    def __init__(self, generator: torch.Generator, rows: int = 1) -> None:
        self._generator, self._rows = generator, rows

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.rand(self._rows, *shape, generator=self._generator, device=self._generator.device)

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(self._rows, *shape, generator=self._generator, device=self._generator.device)

    def shared_normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._generator.device)
