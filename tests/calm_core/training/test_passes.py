"""A step's passes side by side in threads against the same passes in turn."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_core.params import Params, RuntimeParams
from calm_core.runtime import threads as threads_of_process
from calm_core.runtime.process_group import ALONE, ProcessGroup
from calm_core.training import optimisers
from calm_core.training.loop import train
from calm_core.training.passes import threads_of_rows
from calm_core.training.run import Run
from tests.calm_core.training.tiny_regression import TinyModel, TinyRegression
from tests.calm_core.training.tiny_trainings import BUILDS
from tests.support.threads import operators_of


@pytest.fixture()
def runtime(params: Params) -> RuntimeParams:
    return params.runtime.model_copy(update={"precision": "float32"})


@pytest.fixture(params=[2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with operators_of(request.param) as threads:
        yield threads


def trained(objective: Any, params: Params, runtime: RuntimeParams) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    points: list[dict[str, float]] = []
    changes = {"steps": 3, "warmup_steps": 0, "gradient_clip": 1.0, "optimiser": "muon"}
    section = params.calm.model_copy(update=changes)
    model = train(objective, section, runtime, Run(log=lambda done, values: points.append(dict(values))))
    return model.state_dict(), points


@pytest.mark.parametrize("model", BUILDS)
def test_side_by_side_is_in_turn(
    model: str, params: Params, runtime: RuntimeParams, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for most in (1, threads, threads):
        monkeypatch.setattr(threads_of_process, "MOST_SIDE_BY_SIDE", most)
        runs.append(trained(BUILDS[model](params, tmp_path, 0), params, runtime))
    (weights, points), (of_threads, points_of_threads), (again, _) = runs
    for name, weight in weights.items():
        torch.testing.assert_close(of_threads[name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(again[name], of_threads[name]), "the same number of threads, other bytes"
    for point, of_turn in zip(points_of_threads, points, strict=True):
        # Observed at the first part's positions, which are fewer here.
        point.pop("manifold_distance", None), of_turn.pop("manifold_distance", None)
        assert point == pytest.approx(of_turn, rel=1e-3)


class Watched(TinyRegression):
    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self.operators: set[int] = set()

    def loss(self, batch: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        self.operators.add(torch.get_num_threads())
        return super().loss(batch)


def test_rows_are_shared_among_threads_whose_operators_have_one(
    params: Params, runtime: RuntimeParams, threads: int
) -> None:
    objective = Watched()
    halves = runtime.model_copy(update={"gradient_accumulation": 2})
    trained(objective, params, halves)
    size = 4 // threads
    assert sorted(objective.asked, key=lambda one: (one[0], one[1].start)) == [
        (step, range(start, start + size)) for step in range(3) for start in range(0, 8, size)
    ]
    assert objective.operators == {1}
    assert threading.main_thread().name not in objective.threads
    assert torch.get_num_threads() == threads


def test_matrices_are_divided_among_the_threads_of_the_rows(
    params: Params, runtime: RuntimeParams, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[tuple[str, int]] = set()

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        found.add((threading.current_thread().name, torch.get_num_threads()))
        return orthogonalise(*arguments, **options)

    orthogonalise = optimisers.orthogonalise
    monkeypatch.setattr(optimisers, "orthogonalise", watched)
    trained(TinyRegression(), params, runtime)
    assert {operators for _, operators in found} == {1}
    assert threading.main_thread().name not in {name for name, _ in found}


def test_an_error_in_a_thread_ends_the_training(params: Params, runtime: RuntimeParams, threads: int) -> None:
    class Broken(TinyRegression):
        def loss(self, batch: Any) -> Any:
            raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        trained(Broken(), params, runtime)
    assert torch.get_num_threads() == threads


def test_who_shares_rows(params: Params, runtime: RuntimeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [threads_of_rows(model, rows, ALONE, runtime) for rows in (1, 2, 7, 8, 12)] == [1, 2, 1, 4, 6]
    assert threads_of_rows(model, 8, ProcessGroup(0, 2), runtime) == 1
    assert threads_of_rows(model, 8, ProcessGroup(device=torch.device("cuda")), runtime) == 1
    assert threads_of_rows(model, 8, ALONE, runtime.model_copy(update={"compile": True})) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert threads_of_rows(model, 64, ALONE, runtime) == 8
    monkeypatch.setattr(threads_of_process, "LARGEST_SIDE_BY_SIDE", 10)
    assert threads_of_rows(model, 8, ALONE, runtime) == 1
