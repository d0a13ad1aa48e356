"""The process group of a distributed training: rank, the rank's chunk of a batch, and the collectives.

Notable:
- a single process is a group of one whose collectives do nothing, so callers have no special case for it;
- a batch is a function of its step alone and each rank takes its rows of it, so N processes see the data of one;
- decisions (stop now, save now) are all-reduced over gloo on the CPU, without synchronising a GPU.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from calm_core.runtime.device import DeviceName, choose_device
from calm_core.runtime.launcher import is_one_of_many, processes_here

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""Timeout of collectives: a rank may hash or index a corpus meanwhile. gloo detects dead ranks without a timeout."""


@dataclass(frozen=True)
class ProcessGroup:
    """``count`` processes of which this is number ``rank``, computing on ``device``."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def chunk(self, rows: int) -> range:
        """This process's rows of a batch of ``rows``, which the number of processes must divide."""
        size = rows // self.count
        return range(self.rank * size, (self.rank + 1) * size)

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """For each of ``flags`` whether it is true in any of the processes."""
        if self.count == 1:
            return flags
        # The maximum of 0 and 1 is a logical or.
        together = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return [bool(flag) for flag in together.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values``, of the same shape everywhere, over the processes."""
        if self.count > 1:
            # all_reduce writes in place, and the caller's tensor may still be in use.
            values = values.clone()
            dist.all_reduce(values)
            values /= self.count
        return values

    def broadcast_object(self, value: T) -> T:
        """The small, picklable ``value`` of the first process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process has reached this point."""
        if self.count > 1:
            dist.barrier()


ALONE = ProcessGroup()


@contextmanager
def joined(device_name: DeviceName) -> Iterator[ProcessGroup]:
    """The processes of this run, connected to one another while the block runs: gloo on the CPU, NCCL on GPUs.

    Raises:
        CalmError: as ``choose_device``.
    """
    device = choose_device(device_name)
    if not is_one_of_many():
        yield ProcessGroup(device=device)
        return
    # NCCL handles GPU tensors only; gloo stays beside it for tensors on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _talk_within_this_machine()
    # After a restart torchrun's store still holds the addresses of the previous attempt; the prefix hides them.
    store, rank, count = next(rendezvous("env://"))
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        group = ProcessGroup(rank, count, device)
        # Gloo connects every pair of processes: one that fails and leaves meanwhile breaks it for the others.
        group.any_rank([False])
        yield group
    finally:
        dist.destroy_process_group()


def _talk_within_this_machine() -> None:
    """Have gloo listen on the loopback alone if all processes are on this machine, unless the user has said where.

    It would take the address that the machine's name has. A Mac's or a laptop's often has none, or that of a network
    which it is not in at the moment; and there is no need to be open to a network.
    """
    if processes_here() < int(os.environ["WORLD_SIZE"]):
        return
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # as Linux and macOS call it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
