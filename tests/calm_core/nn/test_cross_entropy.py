"""The projected cross entropy against torch's own, on the logits of all positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calm_core.nn import cross_entropy
from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.cross_entropy import projected_cross_entropy


def case(positions: int = 23, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(positions, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    return hidden_states, weight, torch.randint(vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("block", [1, 350, 1 << 21])
def test_value_and_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", block)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)
    hidden_states, weight, targets = case()
    loss = projected_cross_entropy(hidden_states, weight, targets)
    expected = F.cross_entropy(hidden_states @ weight.T, targets)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(3 * loss, (hidden_states, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (hidden_states, weight)))
    with torch.no_grad():
        torch.testing.assert_close(projected_cross_entropy(hidden_states, weight, targets), expected)


def test_bfloat16_products_and_a_float32_loss() -> None:
    hidden_states, weight, targets = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = projected_cross_entropy(hidden_states, weight, targets)
        expected = F.cross_entropy((hidden_states @ weight.T).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (hidden_states, weight))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden_states, weight)), rtol=0.02, atol=1e-3)


def test_no_tensor_has_the_logits_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 4000)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)
    hidden_states, weight, targets = case(positions=200, vocabulary=400)
    with Watch():
        projected_cross_entropy(hidden_states, weight, targets).backward()
    assert largest <= 4000


def test_the_weight_is_rounded_once_and_blocks_are_not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, rows = 0, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
            nonlocal rounded
            if function is torch.ops.aten._to_copy.default and arguments[0].shape == (50, 8):
                rounded += 1
            result = function(*arguments, **(keywords or {}))
            # The logits: products of a block and the weight.
            if function is torch.ops.aten.mm.default and result.shape[1] == 50:
                rows.append(len(result))
            return result

    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 50)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 10)
    hidden_states, weight, targets = case(positions=40)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        projected_cross_entropy(hidden_states, weight, targets)
    assert rounded == 1
    assert set(rows) == {10}


def test_block_sizes() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_at_once(4096, cpu, 1 << 21, least=256) == 512
    assert rows_at_once(128_256, cpu, 1 << 21, least=256) == 256
    # Half a gigabyte of float32 logits.
    assert rows_at_once(128_256, gpu, 1 << 21, least=256) == 1046
    assert rows_at_once(1 << 30, gpu, 1 << 21) == 1
