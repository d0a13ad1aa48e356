"""What rows draw by generators of their own is what each draws alone, whatever shape and subset is asked for."""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from calm_core.runtime import float64
from calm_core.runtime.randomness import generator
from calm_core.runtime.row_generators import BLOCK, RowGenerators, of_rows, uniform

ROWS = 5


def seeded(*rows: int) -> RowGenerators:
    return RowGenerators([torch.Generator().manual_seed(row) for row in rows])


def asked(draws: RowGenerators, rows: list[int]) -> list[Tensor]:
    """Numbers for rows in several shapes, those of a row along dimension 0."""
    found = [uniform((len(rows), 1), draws), uniform((3, len(rows), 2), draws, row_dim=1).movedim(1, 0)]
    found += [uniform((len(rows), 1), draws) for _ in range(BLOCK)]  # past the end of a block
    found.append(uniform((BLOCK + 7, len(rows)), draws, row_dim=1).T)
    found.append(draws.drawn(lambda one: torch.randn(4, 1, 3, generator=one), -2).movedim(1, 0))
    some = of_rows(draws, torch.arange(len(rows)).flip(0))
    found.append(uniform((len(rows), 2), some).flip(0))
    return [*found, uniform((len(rows), 1), draws)]


def test_each_row_draws_what_it_draws_alone() -> None:
    together = asked(seeded(*range(ROWS)), list(range(ROWS)))
    for row in range(ROWS):
        for numbers, alone in zip(together, asked(seeded(row), [row]), strict=True):
            assert torch.equal(numbers[row : row + 1], alone)


def test_numbers_are_those_of_the_generators_and_none_comes_twice() -> None:
    draws = seeded(*range(ROWS))
    found = torch.cat([uniform((ROWS, 1), draws) for _ in range(2 * BLOCK)], dim=1)
    assert found.dtype == torch.float64
    for row, numbers in enumerate(found):
        assert torch.equal(numbers, float64.uniform((2 * BLOCK,), torch.Generator().manual_seed(row)))
    assert len(found.unique()) == found.numel()


def test_one_generator_for_all_rows_draws_as_ever() -> None:
    shared, again = (torch.Generator().manual_seed(0) for _ in range(2))
    assert torch.equal(uniform((3, 2), of_rows(shared, torch.arange(2)), row_dim=1), float64.uniform((3, 2), again))


@pytest.mark.parametrize("key", [lambda row: ("text", row), lambda row: (row, "text")])
def test_the_first_numbers_of_many_rows_are_uniform(key: Callable[[int], tuple[str | int, ...]]) -> None:
    draws = RowGenerators([generator(0, *key(row)) for row in range(5000)])
    for _ in range(3):
        assert kstest(uniform((5000, 1), draws).flatten().numpy(), "uniform").pvalue > 1e-6
