"""A training's state, gathered and put back: what follows is equal to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_core.params import Params
from calm_core.runtime.process_group import ALONE
from calm_core.training.loop import update_weights
from calm_core.training.objective import Objective
from calm_core.training.optimisers import build_optimisers, set_learning_rates
from calm_core.training.state import Optimisers, gather_state, gather_weights, restore_state
from tests.calm_core.training.tiny_trainings import BUILDS


@pytest.fixture()
def section(params: Params) -> Any:
    return params.calm.model_copy(update={"steps": 6, "warmup_steps": 2, "weight_decay": 0.1})


def steps_of(objective: Objective[Any, Any], optimisers: Optimisers, section: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        set_learning_rates(optimisers, step, section)
        loss = objective.loss(objective.batch(step, range(objective.rows))).total
        loss.backward()
        update_weights(objective.model, list(optimisers), section.gradient_clip)
        losses.append(loss.item())
    return losses


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("model", BUILDS)
def test_a_restored_training_goes_on_as_if_it_had_never_stopped(
    model: str, optimiser: str, section: Any, params: Params, tmp_path: Path
) -> None:
    section = section.model_copy(update={"optimiser": optimiser})

    def build(seed: int) -> tuple[Objective[Any, Any], list[torch.optim.Optimizer]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        objective = BUILDS[model](params, folder, seed)
        return objective, build_optimisers(objective.model, section)

    unbroken, stopped = build(0), build(0)
    losses = steps_of(*unbroken, section, range(6))
    assert steps_of(*stopped, section, range(3)) == losses[:3]
    state = gather_state(stopped[0].model, stopped[1])
    kept = {name: tensor.clone() for name, tensor in state.items()}

    objective, _ = build(0)
    for weight in objective.model.parameters():
        torch.nn.init.constant_(weight, 0.5)
    optimisers = build_optimisers(objective.model, section)
    restore_state(state, objective.model, optimisers, ALONE)
    assert_same(gather_state(objective.model, optimisers), kept)
    rates = [group["initial_lr"] for each in optimisers for group in each.param_groups]
    assert rates == [group["initial_lr"] for each in stopped[1] for group in each.param_groups]
    assert steps_of(objective, optimisers, section, range(3, 6)) == losses[3:]
    assert_same(gather_state(objective.model, optimisers), gather_state(unbroken[0].model, unbroken[1]))


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_state_names_every_tensor_of_a_training(
    optimiser: str, section: Any, params: Params, tmp_path: Path
) -> None:
    objective = BUILDS["calm"](params, tmp_path, 0)
    optimisers = build_optimisers(objective.model, section.model_copy(update={"optimiser": optimiser}))
    steps_of(objective, optimisers, section, range(2))
    state = gather_state(objective.model, optimisers)
    weights = {f"model.{name}": weight for name, weight in objective.model.named_parameters()}
    expected = dict(weights)
    names = {id(weight): name for name, weight in objective.model.named_parameters()}
    for each in optimisers:
        keys = ["momentum"] if type(each).__name__ == "Muon" else ["step", "exp_avg", "exp_avg_sq"]
        for group in each.param_groups:
            for weight in group["params"]:
                found = each.state[weight]
                expected.update({f"optimiser.{names[id(weight)]}/{key}": found[key] for key in keys})
    assert_same(state, expected)
    assert not any(tensor.requires_grad or not tensor.is_contiguous() for tensor in state.values())
    assert_same({f"model.{name}": weight for name, weight in gather_weights(objective.model).items()}, weights)
