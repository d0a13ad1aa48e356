"""One generator for all rows of a batch, or one a row: then what a row draws does not depend on the rows beside it.

Notable:
- what samples takes either, so that a text drawn by a generator of its own is the same alone and in any batch;
- a row's numbers are a function of what was asked for it, in that order. They are drawn a row at a time, since one call
  cannot read several generators; where few are asked for, many are drawn at once and handed out.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calm_core.runtime import float64

BLOCK = 64
"""Numbers that a row draws at once where fewer are asked for: a draw takes microseconds, however few it gives."""


class RowGenerators:
    """The generators of the rows of a batch, all on one device."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)
        self.device = self._generators[0].device
        self._drawn = torch.empty(len(self._generators), 0)  # [rows, numbers]
        self._handed_out = 0  # of the numbers drawn

    def of(self, rows: Tensor) -> "RowGenerators":
        """The generators of ``rows`` [n] int64, a row of the result each; they go on where they are.

        Numbers that were drawn ahead for ``uniform`` stay here.
        """
        return RowGenerators([self._generators[row] for row in rows.tolist()])

    def drawn(self, draw: Callable[[torch.Generator], Tensor], dim: int) -> Tensor:
        """What ``draw`` gives for each row's generator, [..., 1, ...], side by side along ``dim``."""
        return torch.cat([draw(one) for one in self._generators], dim=dim)

    def uniform(self, count: int) -> Tensor:
        """[rows, count] float64 in [0, 1), on the ``float64_device``."""
        first, end = self._handed_out, self._handed_out + count
        if end > self._drawn.shape[1]:
            first, end = 0, count
            self._drawn = self.drawn(lambda one: float64.uniform((1, max(count, BLOCK)), one), 0)
        self._handed_out = end
        return self._drawn[:, first:end]


Generators = torch.Generator | RowGenerators


def of_rows(generator: Generators, rows: Tensor) -> Generators:
    """What draws for ``rows`` [n] int64 of a batch for all of which ``generator`` draws."""
    return generator if isinstance(generator, torch.Generator) else generator.of(rows)


def uniform(shape: tuple[int, ...], generator: Generators, row_dim: int = 0) -> Tensor:
    """Numbers of ``shape``, uniform in [0, 1), float64, on the ``float64_device``; ``row_dim`` is that of the rows."""
    if isinstance(generator, torch.Generator):
        return float64.uniform(shape, generator)
    if row_dim == 0 and len(shape) == 2:
        return generator.uniform(shape[1])
    of_row = shape[:row_dim] + shape[row_dim + 1 :]
    return generator.uniform(math.prod(of_row)).reshape(-1, *of_row).movedim(0, row_dim).contiguous()
