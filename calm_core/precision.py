"""Threads and bf16: what the machine at hand does fast.

bf16 matrix products run several times faster than float32 where the processor has units for them (AVX512-BF16,
AMX, any recent GPU), and several times slower where they are emulated; "auto" looks.
"""

import contextlib
import os
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def set_threads(threads: Literal["auto"] | int) -> int:
    """Let torch use ``threads`` CPU threads, or as many as this process may run on; returns the number."""
    count = len(os.sched_getaffinity(0)) if threads == "auto" else threads
    torch.set_num_threads(count)
    return count


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether matrix products run in bf16 on ``device`` under ``precision``."""
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def float32_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context in which float32 matrices are multiplied as they are, in an autocast region too."""
    if device.type == "meta":  # shapes alone, which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context in which matrix products run in bf16 where ``precision`` asks for it; weights stay float32."""
    if uses_bfloat16(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
