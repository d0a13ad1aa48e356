"""What is computed in float32 although a training runs in bf16."""

import contextlib

import torch


def float32_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context in which float32 matrices are multiplied as they are, in an autocast region too."""
    if device.type == "meta":  # shapes alone, which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
