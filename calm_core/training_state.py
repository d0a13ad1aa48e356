"""All tensors that a training carries from one step to the next, by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def training_state(
    model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], sums: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights, state of the optimisers and ``sums``, contiguous and on the CPU.

    Learning rates are left out: each step sets its own.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimiser in enumerate(optimisers):
        for parameter, state in optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{number}.{parameter}.{key}": tensor for key, tensor in state.items()})
    tensors.update({f"sum.{name}": tensor for name, tensor in sums.items()})
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Put what ``training_state`` gathered back into ``model`` and ``optimisers``; returns the sums."""
    model.load_state_dict(_below("model.", tensors))
    for number, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(f"optimiser.{number}.", tensors).items():
            parameter, _, key = name.partition(".")
            state.setdefault(int(parameter), {})[key] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in _below("sum.", tensors).items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
