"""A run by default: nothing is written, and one process is all there is."""

import pytest
import torch

from calm_core.params import Params
from calm_core.runtime.process_group import ALONE, ProcessGroup
from calm_core.training.loop import train
from calm_core.training.run import Run
from tests.calm_core.training.tiny_regression import TinyRegression


def test_defaults() -> None:
    run = Run()
    assert (run.kept_after, run.checkpoints, run.processes) == (frozenset(), None, ALONE)
    assert run.log(1, {"loss": 1.0}) is None
    assert run.keep(1, None) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_writes(rank: int) -> None:
    assert Run(processes=ProcessGroup(rank, 2)).is_first is (rank == 0)


def test_a_training_needs_no_run(params: Params) -> None:
    section = params.calm.model_copy(update={"steps": 3, "warmup_steps": 0})
    models = [train(TinyRegression(), section, params.runtime, run) for run in (None, Run())]
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
        assert first.device.type == "cpu"
