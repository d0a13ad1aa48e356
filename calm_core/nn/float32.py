"""What is computed in float32 although a training runs in bf16."""

import contextlib
from collections.abc import Iterator

import torch


def float32_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context in which float32 matrices are multiplied as they are, in an autocast region too."""
    if device.type == "meta":  # shapes alone, which autocast does not know
        return contextlib.nullcontext()
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return _without_tf32()
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """The 10 bits that TF32 keeps of a factor are as few as bf16's 8 where terms cancel."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
