"""The loop, held against trainings that are written out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calm_core.errors import CalmError
from calm_core.params import CalmParams, Params, RuntimeParams
from calm_core.training.loop import train, update_weights
from calm_core.training.run import Run
from tests.calm_core.training.tiny_objective import TinyObjective
from tests.calm_core.training.tiny_regression import TinyRegression
from tests.calm_core.training.tiny_trainings import keep_float32_in_muon

Weights = dict[str, Tensor]


@pytest.fixture()
def runtime(params: Params) -> RuntimeParams:
    return params.runtime.model_copy(update={"precision": "float32"})


def section_of(params: Params, **changes: Any) -> CalmParams:
    settings = {
        "steps": 8,
        "warmup_steps": 2,
        "schedule": "constant",
        "optimiser": "adamw",
        "learning_rate": 0.01,
        "embedding_learning_rate": 0.03,
        "muon_learning_rate": 0.02,
        "weight_decay": 0.0,
        "gradient_clip": 1e6,
    }
    return params.calm.model_copy(update={**settings, **changes})


def copied(model: nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


class Record:
    """What a run hands out: the weights after each step, and the points of the curve."""

    def __init__(self, kept_after: frozenset[int] = frozenset(range(1, 100))) -> None:
        self.weights: dict[int, Weights] = {}
        self.points: list[tuple[int, dict[str, float]]] = []
        self.run = Run(log=self._log, keep=self._keep, kept_after=kept_after)

    def _log(self, done: int, values: Any) -> None:
        self.points.append((done, dict(values)))

    def _keep(self, done: int, model: nn.Module) -> None:
        assert done not in self.weights
        self.weights[done] = copied(model)


FACTORS = {
    "constant": [1 / 2, 1, 1, 1, 1, 1, 1, 1],
    "linear": [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [1 / 2, 1, *((1 + math.cos(math.pi * share)) / 2 for share in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6))],
}
"""What learning rates are multiplied with, in a training of 8 steps that warms up in 2."""


class OneOfEach(nn.Module):
    """One number as an embedding, as a matrix and as a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(1, 1), nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", FACTORS)
def test_each_weight_moves_by_its_rate_times_the_schedule(
    schedule: str, optimiser: str, params: Params, runtime: RuntimeParams
) -> None:
    """Under a gradient of 1 AdamW moves by the learning rate, and Muon by what five iterations make of 1."""
    share = 1.0
    for _ in range(5):
        share = 3.4445 * share - 4.7750 * share**3 + 2.0315 * share**5
    record, model = Record(), OneOfEach()

    def loss_at(model: nn.Module, step: int) -> dict[str, Tensor]:
        return {"loss": torch.stack([parameter.sum() for parameter in model.parameters()]).sum()}

    section = section_of(params, schedule=schedule, optimiser=optimiser)
    train(TinyObjective(model, loss_at), section, runtime, record.run)
    rates = {
        "embedding.weight": 0.03,
        "hidden.weight": 0.01 if optimiser == "adamw" else 0.02 * share,
        "hidden.bias": 0.01,
    }
    for name, rate in rates.items():
        places = [record.weights[step][name].item() for step in range(1, 9)]
        moved = [-rate * sum(FACTORS[schedule][:done]) for done in range(1, 9)]
        assert places == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", FACTORS)
def test_a_training_is_the_one_written_out(
    schedule: str, optimiser: str, params: Params, runtime: RuntimeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float32_in_muon(monkeypatch)
    changes = {"schedule": schedule, "optimiser": optimiser, "weight_decay": 0.2, "gradient_clip": 20.0}
    record, objective = Record(), TinyRegression()
    trained = train(objective, section_of(params, **changes), runtime, record.run)

    model = (by_hand := TinyRegression()).model
    matrix, embedding = model.hidden.weight, model.embedding.weight
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([embedding], 0.03, betas=(0.9, 0.95), weight_decay=0.2),
        torch.optim.AdamW([model.output.weight], 0.01, betas=(0.9, 0.95), weight_decay=0.2),
        torch.optim.AdamW([model.hidden.bias], 0.01, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.AdamW([matrix], 0.01, betas=(0.9, 0.95), weight_decay=0.2)
        if optimiser == "adamw"
        else torch.optim.Muon([matrix], 0.02, weight_decay=0.2, momentum=0.95),
    ]
    peaks = [each.param_groups[0]["lr"] for each in optimisers]
    norms = []
    for step in range(8):
        loss = by_hand.loss(by_hand.batch(step, range(8)))
        gradients = torch.autograd.grad(loss.total, list(model.parameters()))
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1, 20 / norms[-1])
        for each, peak in zip(optimisers, peaks, strict=True):
            each.param_groups[0]["lr"] = peak * FACTORS[schedule][step]
            each.step()
        torch.testing.assert_close(record.weights[step + 1], copied(model), rtol=1e-4, atol=1e-5)
        done, point = record.points[step]
        expected = {"loss": loss.total.item(), "error": loss.terms["error"].item()}
        expected["first"] = by_hand.batch(step, range(8)).targets[0, 0].item()
        assert (done, point) == (step + 1, pytest.approx(expected, rel=1e-4))
    assert min(norms) < 20 < max(norms)
    torch.testing.assert_close(copied(trained), record.weights[8])
    assert not trained.training


def test_a_huge_gradient_moves_as_a_clipped_one(params: Params, runtime: RuntimeParams) -> None:
    def trajectory(sizes: list[float]) -> list[list[float]]:
        def loss_at(model: nn.Module, step: int) -> dict[str, Tensor]:
            return {"loss": sizes[step] * (0.6 * model.bias.sum() + 0.8 * model.weight.sum())}

        record, model = Record(), nn.Linear(1, 1)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        section = section_of(params, steps=len(sizes), gradient_clip=0.5)
        train(TinyObjective(model, loss_at), section, runtime, record.run)
        return [[weight.item() for weight in weights.values()] for weights in record.weights.values()]

    clipped, below = trajectory([0.5, 0.5, 0.5, 0.5]), trajectory([0.5, 0.5, 0.1, 0.5])
    for step, place in enumerate(trajectory([0.5, 50.0, 5e5, 0.5])):
        assert place == pytest.approx(clipped[step], rel=1e-4)
    assert below[2] != pytest.approx(clipped[2], rel=1e-2)  # a small one is left as it is


@pytest.mark.parametrize(("clip", "share"), [(2.0, 0.4), (10.0, 1.0)])
def test_a_step_follows_the_clipped_gradient(clip: float, share: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    for step in (1, 2):  # the second without the gradient of the first
        model(torch.tensor([3.0, -4.0])).sum().backward()
        norm = update_weights(model, [optimiser], clip)
        assert norm.item() == pytest.approx(5)
        assert model.weight.flatten().tolist() == pytest.approx([-0.5 * share * 3 * step, 0.5 * share * 4 * step])


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_micro_batches_change_nothing_but_rounding(optimiser: str, params: Params, runtime: RuntimeParams) -> None:
    # AdamW and Muon do not mind the size of gradients; the clip, which bites in some steps, tells a sum from a mean.
    section = section_of(params, optimiser=optimiser, weight_decay=0.1, gradient_clip=20.0)
    whole = Record()
    train(TinyRegression(), section, runtime, whole.run)
    for parts in (2, 4):
        record, objective = Record(), TinyRegression()
        divided = runtime.model_copy(update={"gradient_accumulation": parts})
        train(objective, section, divided, record.run)
        size = 8 // parts
        asked = [(step, range(start, start + size)) for step in range(8) for start in range(0, 8, size)]
        assert objective.asked == asked
        torch.testing.assert_close(record.weights, whole.weights, rtol=1e-4, atol=1e-5)
        for (done, values), (same, expected) in zip(record.points, whole.points, strict=True):
            assert done == same
            assert values == pytest.approx(expected, rel=1e-4)
        # What is observed is of the first micro-batch.
        for step, features in enumerate(objective.observed):
            assert torch.equal(features, objective.batch(step, range(size)).targets)
        assert len(objective.observed) == 8


@pytest.mark.parametrize("parts", [3, 16])
def test_a_batch_that_cannot_be_divided_is_refused(parts: int, params: Params, runtime: RuntimeParams) -> None:
    divided = runtime.model_copy(update={"gradient_accumulation": parts})
    with pytest.raises(CalmError, match=f"regression: a batch of 8 is not divisible by 1 processes times .* {parts};"):
        train(TinyRegression(), section_of(params), divided)


def test_models_are_kept_after_the_steps_asked_for(params: Params, runtime: RuntimeParams) -> None:
    every, some = Record(), Record(frozenset({2, 5, 8, 11}))
    for record in (every, some):
        train(TinyRegression(), section_of(params), runtime, record.run)
    assert list(some.weights) == [2, 5, 8]
    for step, weights in some.weights.items():
        torch.testing.assert_close(weights, every.weights[step], rtol=0, atol=0)
        assert not torch.equal(weights["hidden.bias"], every.weights[step - 1]["hidden.bias"])


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_have_the_precision_asked_for(
    precision: str, dtype: torch.dtype, params: Params, runtime: RuntimeParams
) -> None:
    seen = []

    def loss_at(model: nn.Module, step: int) -> dict[str, Tensor]:
        assert model.training
        result = model(torch.ones(3))
        seen.append(result.dtype)
        return {"loss": result.float().sum()}

    chosen = runtime.model_copy(update={"precision": precision})
    model = train(TinyObjective(nn.Linear(3, 1), loss_at), section_of(params), chosen)
    assert set(seen) == {dtype}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def run(
    params: Params, runtime: RuntimeParams, loss_at: Any, steps: int
) -> tuple[nn.Linear, list[tuple[int, dict[str, float]]]]:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    section = params.calm.model_copy(update={"steps": steps, "warmup_steps": 0, "optimiser": "adamw"})
    logged: list[tuple[int, dict[str, float]]] = []
    log = Run(log=lambda step, values: logged.append((step, dict(values))))
    train(TinyObjective(model, loss_at), section, runtime, log)
    return model, logged


def test_the_log_holds_means_since_the_last_point(params: Params, runtime: RuntimeParams) -> None:
    def loss_at(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
        return {"loss": model(torch.ones(3)).square().sum(), "step": torch.tensor(float(step))}

    _, logged = run(params, runtime, loss_at, 450)
    assert [step for step, _ in logged][:2] == [2, 4]
    assert logged[-1][0] == 450
    assert [values["step"] for _, values in logged] == [pytest.approx(step - 1.5) for step, _ in logged]
    assert logged[-1][1]["loss"] < 1e-2 * logged[0][1]["loss"]


def test_a_loss_that_is_no_number_stops_training(params: Params, runtime: RuntimeParams) -> None:
    def loss_at(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
        return {"loss": model(torch.ones(3)).sum() * (float("nan") if step == 5 else 1.0)}

    with pytest.raises(CalmError, match=r"the loss is nan at step 6"):
        run(params, runtime, loss_at, 20)
