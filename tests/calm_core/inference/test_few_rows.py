"""Products of few rows with large matrices: the same numbers as torch's, from the other side."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calm_core.inference import few_rows
from calm_core.inference.few_rows import products_of_few_rows

WIDE = 2048


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 4), (16,), (17,), (0,)])
def test_products_are_those_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(512, WIDE, bias=bias).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(*shape, 512, generator=generator)
    with products_of_few_rows([model]):
        found = model(x)
    torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-5)


def test_only_few_rows_of_large_matrices_in_float32_are_multiplied_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = few_rows._linear
    monkeypatch.setattr(few_rows, "_linear", lambda x, *others: (seen.append(tuple(x.shape)), real(x, *others))[1])
    large, small = torch.zeros(WIDE, 512), torch.zeros(WIDE, 511)
    with products_of_few_rows([nn.Linear(512, WIDE)]):
        F.linear(torch.zeros(few_rows.MOST_ROWS, 512), large)
        assert seen == [(few_rows.MOST_ROWS, 512)]
        F.linear(torch.zeros(few_rows.MOST_ROWS + 1, 512), large)
        F.linear(torch.zeros(1, 511), small)
        F.linear(torch.zeros(1, 512).bfloat16(), large.bfloat16())
    F.linear(torch.zeros(1, 512), large)
    with products_of_few_rows([nn.Linear(511, WIDE)]):
        F.linear(torch.zeros(1, 512), large)  # nothing is watched for models that have no large matrix
    assert len(seen) == 1
