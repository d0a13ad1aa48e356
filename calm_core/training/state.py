"""All tensors that a training carries from one step to the next, by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from calm_core.training.sharding import placed_like, whole


def training_state(
    model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], sums: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights, state of the optimisers and ``sums``, whole, contiguous and on the CPU.

    Learning rates are left out: each step sets its own. However many processes the tensors were spread over, the result
    is the same; every process has to ask.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{number}.{parameter}.{key}": tensor for key, tensor in state.items()})
    tensors.update({f"sum.{name}": tensor for name, tensor in sums.items()})
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def restore_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Put what ``training_state`` gathered back into ``model`` and ``optimisers``, sharded as they are now.

    Returns the sums.
    """
    now = model.state_dict()
    model.load_state_dict({name: placed_like(one, now[name]) for name, one in _below("model.", tensors).items()})
    for number, optimiser in enumerate(optimisers):
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(f"optimiser.{number}.", tensors).items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            placed = placed_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
            state.setdefault(int(index), {})[key] = placed
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in _below("sum.", tensors).items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
