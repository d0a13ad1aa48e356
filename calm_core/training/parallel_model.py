"""Data parallelism around an unchanged model: replicas that average gradients (DDP), or shards (FSDP2).

Notable:
- model code stays single-device: a step calls the model inside ``ParallelModel.forward``, the one forward pass that the
  hooks of torch's DistributedDataParallel and fully_shard see;
- FSDP shards each layer on its own and the rest, such as embeddings, as one group; weights, gradients and optimiser
  state stay sharded, and a layer's weights are gathered while it computes;
- in bf16 a layer's weights are gathered in it, half of what float32 would take, and gradients are added in float32.
  Products round their factors to bf16 anyway; embeddings, output matrix and last norm are gathered in float32;
- compilation, too, is applied from outside, layer by layer: equal layers share what is compiled.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from calm_core.nn.layers import ResidualSwiGLU
from calm_core.params import RuntimeParams
from calm_core.runtime.precision import autocast, uses_bfloat16
from calm_core.runtime.process_group import ProcessGroup
from calm_core.training.objective import Model
from calm_core.training.state import gather_weights

T = TypeVar("T")


class ParallelModel(Generic[Model]):
    """``model``, moved to the device of ``processes`` and wrapped for them, in place.

    With ``runtime.activation_checkpointing`` a layer's activations are computed again in the backward pass instead of
    kept; with ``runtime.compile`` layers are compiled.
    """

    def __init__(self, model: Model, processes: ProcessGroup, runtime: RuntimeParams) -> None:
        self.model, self._processes, self._precision = model, processes, runtime.precision
        for layer in _layers(model):
            if runtime.compile:
                layer.forward = torch.compile(layer.forward)
            if runtime.activation_checkpointing:
                # Around what is compiled, which torch.compile would leave out otherwise. No layer draws random numbers,
                # so none need to be drawn again.
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        model.to(processes.device)
        self._root: nn.Module = _Within(model)
        if processes.count == 1:
            return
        if runtime.parallelism == "ddp":
            # DDP accepts device_ids for GPUs alone.
            devices = None if processes.device.type == "cpu" else [processes.device]
            self._root = DistributedDataParallel(self._root, device_ids=devices)
            return
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        # FSDP2 shards bottom-up: the root's group is what no layer has taken. With the root alone, every forward pass
        # would gather the whole model.
        bfloat16 = uses_bfloat16(runtime.precision, processes.device)
        policy = MixedPrecisionPolicy(torch.bfloat16 if bfloat16 else None, torch.float32, cast_forward_inputs=False)
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self._root, mesh=mesh)

    def forward(self, work: Callable[[], T]) -> T:
        """``work()``, which uses the model; gradients of what it returns are averaged over the processes."""
        return self._root(work)

    def no_grad_forward(self, work: Callable[[], T]) -> T:
        """``work()``, which uses the model without gradients, in the precision of the training."""
        # Weights that are gathered in bf16 multiply nothing but bf16.
        with torch.no_grad(), autocast(self._precision, self._processes.device):
            result = self._root(work)
        if isinstance(self._root, FSDPModule):
            self._root.reshard()  # a backward pass would do so
        return result

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Context for a micro-batch that is not the last of its step: gradients add up in this process alone."""
        if isinstance(self._root, DistributedDataParallel):
            return self._root.no_sync()
        if isinstance(self._root, FSDPModule):
            return _reduce_gradients_later(self._root)
        return contextlib.nullcontext()

    def full_model(self) -> Model:
        """The model with unsharded weights in the first process; in the others what they hold. A collective."""
        if not isinstance(self._root, FSDPModule):
            return self.model
        weights = gather_weights(self.model)
        if not self._processes.is_first:
            return self.model
        # No memory for weights that are replaced at once: the gathered tensors become the parameters themselves.
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict(weights, assign=True)
        return model


class _Within(nn.Module):
    """A module whose forward pass is any function that uses ``model``.

    A step uses several methods of a model, and DDP and FSDP hook into ``forward`` alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The repeated modules: backbone layers, blocks of a head, layers of an autoencoder."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    listed = [layer for each in lists for layer in each]
    return listed + [module for module in model.modules() if isinstance(module, ResidualSwiGLU)]


@contextlib.contextmanager
def _reduce_gradients_later(root: FSDPModule) -> Iterator[None]:
    # FSDP2's counterpart of DDP's no_sync: gradients stay unsharded and add up until the last micro-batch reduces them.
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)
