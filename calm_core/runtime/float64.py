"""Float64 beside any device: where its tensors live, and uniform numbers drawn by a generator of that device.

Sums of probabilities over a vocabulary, and the weights of the temperature samplers, need more than float32's seven
digits. CPUs and CUDA have float64; Apple's GPUs have not, and what needs it is computed on the CPU there.
"""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64."""


def float64_device(device: torch.device) -> torch.device:
    """Where float64 tensors are that belong to tensors of ``device``: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of ``shape``, uniform in [0, 1), float64, on the ``float64_device`` of the generator's device."""
    device = generator.device
    if device.type not in WITHOUT_FLOAT64:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    # A float32 draw is a multiple of 2^-24; a second one fills in the digits below, which tell rare tokens apart.
    high, low = torch.rand((2, *shape), generator=generator, device=device).cpu().double()
    return high + low / 2**24
