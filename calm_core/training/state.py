"""The state of a training, weights and optimisers: gathered in the first process, and broadcast or sharded again.

torch.distributed.checkpoint.state_dict does the work. It names tensors by parameter, so a state does not depend on how
many processes it was sharded over, and the full state is in the memory of the first process alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from calm_core.runtime.process_group import ProcessGroup

Optimisers = Sequence[torch.optim.Optimizer]

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model``, unsharded and on the CPU in the first process, {} in the others; a collective."""
    weights: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    return weights


def gather_state(model: nn.Module, optimisers: Optimisers) -> dict[str, Tensor]:
    """Weights and optimiser state by name, as ``gather_weights``; to be called after a step, which makes that state.

    Learning rates are left out: each step sets its own.
    """
    tensors = {f"model.{name}": weight for name, weight in gather_weights(model).items()}
    gathered: dict[str, Any] = get_optimizer_state_dict(model, optimisers, options=_GATHERED)
    for parameter, state in gathered.get("state", {}).items():
        tensors.update({f"optimiser.{parameter}/{key}": value for key, value in state.items()})
    # Safetensors stores contiguous tensors only.
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def restore_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimisers: Optimisers, processes: ProcessGroup
) -> None:
    """Put what ``gather_state`` returned back into ``model`` and ``optimisers``, sharded as they are now.

    The first process has the ``tensors``; the others pass {}.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes.count > 1)
    weights: dict[str, Any] = _below("model.", tensors)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _below("optimiser.", tensors).items():
        # Parameter names have dots and no slash.
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = tensor
    set_model_state_dict(model, weights, options=options)
    # The groups' settings come from the optimisers as they were built, not from the checkpoint.
    groups = get_optimizer_state_dict(model, optimisers)["param_groups"]
    loaded: dict[str, Any] = {"state": states, "param_groups": groups} if processes.is_first else {}
    set_optimizer_state_dict(model, optimisers, loaded, options=options)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
