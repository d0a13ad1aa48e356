"""Cross entropy of a vocabulary projection, without the logits of all positions in memory.

Logits are the largest tensor of a small model's step, and autograd would keep two copies more. Here the forward pass
takes positions block by block: it projects a block, scores it and computes its gradient while it is in the processor's
cache. The loss is a sum over positions, so the backward pass needs the gradients of hidden states and weights alone.
Autocast's dtype is that of the products; the weight is rounded to it once, not once a block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.nn.block_sizes import rows_at_once

BLOCK_LOGITS = 1 << 21
"""Logits of a block on a CPU."""

LEAST_ROWS = 256
"""Positions of a block at least: with 16, products run at a third of a CPU's rate, which costs more than the cache
saves."""


def projected_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over positions of -log softmax(hidden_states @ weight^T)[target], in nats.

    ``hidden_states`` is [positions, hidden], ``weight`` [vocabulary, hidden], ``targets`` [positions] int64. Products
    follow autocast, the softmax is in float32. Equal to ``torch.nn.functional.cross_entropy`` up to rounding.
    """
    # Whether gradients are wanted is asked here: inside a Function's forward, grad mode is always off.
    return _ProjectedCrossEntropy.apply(hidden_states, weight, targets, torch.is_grad_enabled())


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, train: bool) -> Tensor:
        # At a vocabulary of 4096 a block has 512 positions on a CPU.
        positions = rows_at_once(len(weight), weight.device, BLOCK_LOGITS, LEAST_ROWS)
        device_type, dtype = weight.device.type, weight.dtype
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        # Once, and not left to autocast, which rounds a weight anew in each block.
        rounded = weight.to(dtype)
        total = hidden_states.new_zeros((), dtype=torch.float32)
        of_hidden_states = torch.empty_like(hidden_states) if train else None
        # A float32 sum over blocks, also where autocast multiplies in bf16.
        of_weight = torch.zeros_like(weight) if train else None
        for first in range(0, len(targets), positions):
            block = hidden_states[first : first + positions].to(dtype)
            target = targets[first : first + positions, None]
            # The softmax in float32: in bf16 the sum over a vocabulary would lose most of its terms.
            logits = F.linear(block, rounded).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            total += (normaliser - logits.gather(-1, target)).sum()
            if of_hidden_states is None or of_weight is None:
                continue
            # d loss / d logits = (softmax - [target]) / positions, in the memory of the logits.
            gradient = logits.sub_(normaliser).exp_().div_(len(targets))
            gradient.scatter_add_(-1, target, gradient.new_full((), -1 / len(targets)).expand_as(target))
            gradient = gradient.to(dtype)
            of_hidden_states[first : first + positions] = gradient @ rounded
            of_weight += gradient.T @ block
        if of_hidden_states is not None and of_weight is not None:
            ctx.save_for_backward(of_hidden_states, of_weight)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_hidden_states, of_weight = ctx.saved_tensors
        (gradient,) = gradients
        # The gradients are those of the mean loss; ``gradient`` is the factor that the caller puts on it, such as K.
        return of_hidden_states * gradient.to(of_hidden_states.dtype), of_weight * gradient, None, None
