"""Products of few rows with large matrices on a CPU, as a step of generation of a large model has them.

A step of one text multiplies a vector, or K of them in the decoder, with every matrix of a model; what takes time is
to read the matrices. torch's ``linear`` is x W^T with the rows x from the left, and for one to a dozen of them its
library (MKL, on an AMD EPYC) reads W with a third to two thirds of the bandwidth that there is: one row goes through a
product of one thread, four through one that is slower still. The same product as (W x^T)^T, of two columns at least,
has all threads. docs/performance.md has what that gives.

It is applied to models from outside: each ``linear`` of such a shape is computed so, whichever module calls it. Sums
are in another order: results agree but for rounding.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MOST_ROWS = 16
"""From there on the usual product is as fast."""

LEAST_WEIGHTS = 1 << 20
"""Weights of a matrix that is worth it: a smaller one stays in the processor's cache."""


def products_of_few_rows(models: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Context in which ``models`` multiply few rows fast; nothing changes on other devices and for small matrices."""
    weights = (parameter for model in models for parameter in model.parameters())
    worth_it = any(weight.device.type == "cpu" and weight.numel() >= LEAST_WEIGHTS for weight in weights)
    # Each call of torch passes through the mode, which small models would notice.
    return _FewRows() if worth_it else nullcontext()


class _FewRows(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_worth_it(*args[:2]):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    few = 0 < x.numel() <= MOST_ROWS * x.shape[-1] and weight.numel() >= LEAST_WEIGHTS
    return few and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count == 1:
        rows = F.pad(rows, (0, 0, 0, 1))  # a single column would be a matrix-vector product again
    product = torch.mm(weight, rows.T).T[:count]
    if bias is not None:
        product = product + bias
    return product.reshape(*x.shape[:-1], len(weight))
