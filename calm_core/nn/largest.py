"""The most probable token: argmax over a vocabulary, several times as fast on a CPU as torch's own.

torch's argmax goes through the numbers one by one there, which takes up to as long as the product that made the logits.
Its maximum is vectorised: the best block of tokens is found by maxima, and the token in that block.
"""

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block."""

FEW_LOGITS = 1 << 16
"""Fewer are searched faster than the operators for blocks are called."""


def largest(logits: Tensor) -> Tensor:
    """``logits.argmax(dim=1)`` of [rows, vocabulary], [rows] int64: the first of equal ones."""
    size = logits.shape[1]
    whole = size - size % BLOCK
    if logits.device.type != "cpu" or logits.numel() < FEW_LOGITS or not whole:
        return logits.argmax(dim=1)
    rows = torch.arange(len(logits))
    blocks = logits[:, :whole].unflatten(1, (-1, BLOCK))
    highest = blocks.amax(dim=2)
    best = highest.argmax(dim=1)
    found = best * BLOCK + blocks[rows, best].argmax(dim=1)
    if whole == size:
        return found
    rest = logits[:, whole:]
    return torch.where(rest.amax(dim=1) > highest[rows, best], whole + rest.argmax(dim=1), found)
