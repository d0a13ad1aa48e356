"""A training on a GPU does not wait: what it copies and reads, counted on a device that pretends to be one."""

from pathlib import Path

import pytest

from calm_core.params import Params
from calm_core.runtime.process_group import ProcessGroup
from calm_core.training import curve
from calm_core.training.loop import train
from calm_core.training.run import Run
from tests.calm_core.training.tiny_trainings import BUILDS
from tests.support.pretend_device import PretendDevice, pretend_device

READ = {"autoencoder": 1, "transformer": 1, "calm": 3, "calm of latents": 4, "calm of tokens": 1}
"""Tensors that a batch is read into: token ids, and what was encoded before. Draws are made on the device."""


def trained(model: str, params: Params, folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> PretendDevice:
    """Transfers of a training of two points on the curve."""
    monkeypatch.setattr(curve, "LOGGED_POINTS", 2)
    points: list[int] = []
    with pretend_device() as pretend:
        objective = BUILDS[model](params, folder, 0)
        if hasattr(objective, "_autoencoder"):
            objective._autoencoder.to(pretend.device)
        pretend.forget()
        section = params.calm.model_copy(update={"steps": steps, "warmup_steps": 0})
        runtime = params.runtime.model_copy(update={"precision": "float32", "device": "cpu"})
        run = Run(log=lambda done, values: points.append(done), processes=ProcessGroup(device=pretend.device))
        train(objective, section, runtime, run)
    assert points == [steps // 2, steps]
    return pretend


@pytest.mark.parametrize("model", BUILDS)
def test_steps_read_nothing_but_at_points_of_the_curve(
    model: str, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (trained(model, params, tmp_path, steps, monkeypatch) for steps in (4, 10))
    assert len(few.from_device) > 0  # the points themselves, and the model in the end
    assert [one.place for one in many.from_device] == [one.place for one in few.from_device]


@pytest.mark.parametrize("model", BUILDS)
def test_steps_copy_what_was_read(model: str, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (trained(model, params, tmp_path, steps, monkeypatch) for steps in (4, 10))
    assert len(many.to_device) - len(few.to_device) == 6 * READ[model], {one.place for one in many.to_device}
