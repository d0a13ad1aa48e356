"""How many rows of a large intermediate tensor are computed at once.

On a CPU as many as its cache holds: what a block's steps share then never goes through memory. A GPU wants work for all
of its cores and few launches, so its blocks are bounded by memory alone.
"""

import torch

GPU_VALUES = 1 << 27
"""Values of a block on a GPU, half a gigabyte of float32."""


def rows_at_once(values_a_row: int, device: torch.device, in_cache: int, least: int = 1) -> int:
    """Rows of a block, ``least`` or more, of ``values_a_row`` values each; ``in_cache`` of them suit a CPU's cache."""
    return max(least, (in_cache if device.type == "cpu" else GPU_VALUES) // values_a_row)
