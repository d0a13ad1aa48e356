"""Threads and bf16: what the machine at hand does fast.

bf16 matrix products run several times faster than float32 where the processor has units for them (AVX512-BF16,
AMX, any recent GPU), and several times slower where they are emulated; "auto" detects which.
"""

import contextlib
import ctypes
import os
import re
from typing import Literal

import torch

from calm_core.runtime.launcher import processes_here
from calm_core.runtime.processors import available_processors

Precision = Literal["auto", "float32", "tf32", "bfloat16"]


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def set_threads(threads: Literal["auto"] | int) -> int:
    """Let torch use ``threads`` CPU threads; returns the number.

    "auto" heeds OMP_NUM_THREADS. Without it, it is the number of processors that this process may use (affinity, CPU
    quota); processes that torchrun started on one machine share them.

    Also lets the process keep the memory that it frees, see ``keep_freed_memory``.
    """
    keep_freed_memory()
    count = _automatic_threads() if threads == "auto" else threads
    torch.set_num_threads(count)
    return count


def _automatic_threads() -> int:
    # A list is a number for each level of nested loops. What OpenMP would not take for a number is as if it were unset.
    # torchrun sets 1 if it starts several processes and the user has set none. That is heeded like any other: the
    # warning that torchrun prints is then true.
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if re.fullmatch(r"[1-9]\d{0,4}", wanted, re.ASCII):
        return int(wanted)
    return max(1, available_processors() // processes_here())


def keep_freed_memory() -> None:
    """Have the allocator reuse large blocks instead of returning them to the system at once; glibc alone, else nothing.

    A training step allocates the same tensors again and again. By default glibc maps each large one anew, and
    the page faults cost a small model's step a quarter of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    # mallopt takes an int: the largest thresholds that can be asked for, and a heap that grows by 64 MiB.
    largest = 2**31 - 1
    mallopt(M_MMAP_THRESHOLD, largest)
    mallopt(M_TRIM_THRESHOLD, largest)
    mallopt(M_TOP_PAD, 64 << 20)


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is known to multiply bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        # Apple's GPUs accept bf16 from macOS 14 on; none says whether it multiplies it faster than float32.
        return False
    # x86 alone. Many arm processors have such instructions, but whether torch's kernels use them depends on its build
    # and on how the operands lie in memory, and there was none to measure a training step on: what is not known to be
    # faster is not automatic. `precision: bfloat16` still asks for it.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def products(precision: Precision, device: torch.device) -> torch.dtype:
    """What matrix products run in on ``device`` under ``precision``: bfloat16 or float32."""
    return torch.bfloat16 if uses_bfloat16(precision, device) else torch.float32


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether matrix products run in bf16 on ``device`` under ``precision``."""
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def set_float32_products(precision: Precision, device: torch.device) -> None:
    """Let an NVIDIA GPU multiply float32 matrices in TF32, with 10 bits of a factor, or not, for this process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context in which matrix products run in bf16 where ``precision`` asks for it; weights stay float32."""
    if uses_bfloat16(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
