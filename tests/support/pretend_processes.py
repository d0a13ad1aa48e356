"""Two processes of which there is one: torch's fake process group, whose collectives return at once, with anything.

What is set up for several processes, and where its tensors are, can be seen in it; values cannot.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from calm_core.runtime.process_group import ProcessGroup

FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup"


@contextmanager
def pretend_processes(device: torch.device, count: int = 2) -> Iterator[ProcessGroup]:
    """The first of ``count`` processes that compute on ``device``, the pretend device or the CPU."""
    # FSDP asks a module named as the device for its streams, and takes a tensor of "meta" for one without values.
    streams = SimpleNamespace(**{**vars(torch.cpu), "current_device": lambda: device.index})
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        with (
            mock.patch.object(torch, "meta", streams, create=True),
            mock.patch(f"{FSDP}._validate_no_meta_params", lambda self: None),
        ):
            yield ProcessGroup(0, count, device)
    finally:
        dist.destroy_process_group()
