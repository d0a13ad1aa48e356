"""Tensors that FSDP shards over processes: gathered, and sharded again. Plain tensors stay what they are."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` unsharded; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """``tensor``, equal in all processes, sharded as ``reference`` is."""
    if not isinstance(reference, DTensor):
        return tensor
    # src_data_rank=None: every process has the whole tensor and keeps its own shard of it, without communication.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)
