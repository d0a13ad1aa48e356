"""Tensors that FSDP spreads over processes: in one piece, and back. Plain tensors stay what they are."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` in one piece; every process has to ask where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """``tensor``, the same everywhere, sharded as ``reference`` is and on its device."""
    if not isinstance(reference, DTensor):
        return tensor.to(reference.device)
    local = tensor.to(reference.device)
    return distribute_tensor(local, reference.device_mesh, reference.placements, src_data_rank=None)
