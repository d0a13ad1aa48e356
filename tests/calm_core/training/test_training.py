"""The optimisers, the schedule and the loop."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.training.batches import batch_indices
from calm_core.training.loop import train
from calm_core.training.optimisers import Muon, build_optimisers, learning_rate_factor, orthogonalise
from calm_core.training.run import Run
from tests.calm_core.training.tiny_objective import TinyObjective


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)])
def test_orthogonalise_keeps_directions_and_evens_out_strengths(shape: tuple[int, int]) -> None:
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    strengths = torch.linalg.svdvals(result)
    assert strengths.min() > 0.3
    assert strengths.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right
    cosine = (result * nearest).sum(dim=(1, 2)) / result.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))
    assert cosine.min() > 0.95


def test_muon_steps_have_the_same_size_for_any_gradient() -> None:
    parameters = [nn.Parameter(torch.zeros(6, 3)) for _ in range(2)]
    direction = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for parameter, scale in zip(parameters, (1e-3, 1e3), strict=True):
        parameter.grad = scale * direction
    Muon(parameters, lr=0.1).step()
    torch.testing.assert_close(parameters[0], parameters[1], atol=1e-4, rtol=1e-3)
    assert torch.linalg.svdvals(parameters[0].detach()).max() < 1.3 * 0.1 * math.sqrt(2)


def test_every_parameter_has_one_optimiser(params: Params) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.hidden = nn.Linear(4, 4)
            self.output = nn.Linear(4, 5)

    model = Model()
    for name in ("muon", "adamw"):
        section = params.calm.model_copy(update={"optimiser": name, "weight_decay": 0.1})
        optimisers = build_optimisers(model, section)
        held = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
        assert Counter(map(id, held)) == Counter(map(id, model.parameters()))
        decayed = {
            id(p) for o in optimisers for group in o.param_groups if group["weight_decay"] for p in group["params"]
        }
        assert decayed == {id(model.hidden.weight)}


def test_schedules(params: Params) -> None:
    def factors(**changes: Any) -> list[float]:
        section = params.calm.model_copy(update={"steps": 110, "warmup_steps": 10, **changes})
        return [learning_rate_factor(step, section) for step in range(110)]

    constant, linear, cosine = (factors(schedule=name) for name in ("constant", "linear", "cosine"))
    for values in (constant, linear, cosine):
        assert values[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
        assert min(values) > 0
    assert constant[10:] == [1.0] * 100
    assert linear[60] == pytest.approx(0.5)
    assert cosine[60] == pytest.approx(0.5)
    assert cosine[35] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_each_block_once_an_epoch_in_a_new_order() -> None:
    seen = torch.cat([batch_indices(step, 4, 10, 0, "stage") for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert batch_indices(3, 4, 10, 0, "stage").tolist() == seen[12:16]
    assert batch_indices(3, 4, 10, 1, "stage").tolist() != seen[12:16]


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 7), (7, 3), (5, 5), (4, 9)])
def test_batches_cut_the_shuffled_epochs_whatever_was_asked_before(batch: int, count: int) -> None:
    epochs = [torch.randperm(count, generator=generator(3, "stage", "order", epoch)) for epoch in range(20)]
    expected = torch.cat(epochs)
    steps = torch.randperm(20 * count // batch, generator=torch.Generator().manual_seed(0)).tolist()
    for step in [*steps, *steps[:3]]:
        indices = batch_indices(step, batch, count, 3, "stage")
        assert indices.tolist() == expected[step * batch : (step + 1) * batch].tolist()
        indices.zero_()  # what is done to a batch stays there


def test_generators_depend_on_their_purpose_alone() -> None:
    def draw(*purpose: str | int) -> float:
        return torch.rand(1, generator=generator(*purpose)).item()  # type: ignore[arg-type]

    assert draw(0, "noise", 7) == draw(0, "noise", 7)
    assert len({draw(0, "noise", 7), draw(1, "noise", 7), draw(0, "noise", 8), draw(0, "data", 7)}) == 4


def run(params: Params, loss_at: Any, steps: int) -> tuple[nn.Linear, list[tuple[int, dict[str, float]]]]:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    section = params.calm.model_copy(update={"steps": steps, "warmup_steps": 0, "optimiser": "adamw"})
    logged: list[tuple[int, dict[str, float]]] = []
    log = Run(log=lambda step, values: logged.append((step, dict(values))))
    train(TinyObjective(model, loss_at), section, params.runtime, log)
    return model, logged


def test_the_log_holds_means_since_the_last_point(params: Params) -> None:
    def loss_at(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
        return {"loss": model(torch.ones(3)).square().sum(), "step": torch.tensor(float(step))}

    _, logged = run(params, loss_at, 450)
    assert [step for step, _ in logged][:2] == [2, 4]
    assert logged[-1][0] == 450
    assert [values["step"] for _, values in logged] == [pytest.approx(step - 1.5) for step, _ in logged]
    assert logged[-1][1]["loss"] < 1e-2 * logged[0][1]["loss"]


def test_a_loss_that_is_no_number_stops_training(params: Params) -> None:
    def loss_at(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
        return {"loss": model(torch.ones(3)).sum() * (float("nan") if step == 5 else 1.0)}

    with pytest.raises(CalmError, match=r"the loss is nan at step 6"):
        run(params, loss_at, 20)
