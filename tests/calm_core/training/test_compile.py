"""Compiled layers train as they are."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from calm_core.params import Params
from calm_core.training.loop import train
from calm_core.training.run import Run
from tests.calm_core.training.tiny_trainings import BUILDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler here"
    ),
]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("model", ["transformer", "calm"])
def test_losses_are_those_of_layers_as_they_are(
    model: str, activation_checkpointing: bool, params: Params, tmp_path: Path
) -> None:
    section = params.calm.model_copy(update={"steps": 3, "warmup_steps": 0})
    losses: dict[bool, list[float]] = {}
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        losses[compiled] = []
        changes = {"precision": "float32", "compile": compiled, "activation_checkpointing": activation_checkpointing}
        runtime = params.runtime.model_copy(update=changes)
        run = Run(log=lambda done, values, of=compiled: losses[of].append(values["loss"]))  # type: ignore[misc]
        trained = train(BUILDS[model](params, tmp_path, 0), section, runtime, run)
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    # What is saved has the names of a model as it is.
    assert trained.state_dict().keys() == BUILDS[model](params, tmp_path, 0).model.state_dict().keys()
