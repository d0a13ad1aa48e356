"""Checkpoints: what is written is what is read, damage is noticed, and a training goes on with the same numbers."""

import contextlib
import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calm_core.training.checkpoints
from calm_core.errors import CalmError
from calm_core.params import Params, load_params
from calm_core.training.checkpoints import Checkpoint, CheckpointStore
from calm_core.training.loop import train
from calm_core.training.run import Run
from tests import ROOT
from tests.calm_core.training.tiny_objective import TinyObjective
from tests.sampling import sampled

STEPS = 450
"""Of the training in these tests: two steps lie between two points of its curve."""


@pytest.fixture()
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def checkpoint(step: int) -> Checkpoint:
    draws = torch.Generator().manual_seed(step)
    tensors = {"model.weight": torch.randn(40, 30, generator=draws), "sum.loss": torch.tensor(0.1 * step)}
    return Checkpoint(step, tensors, [(done, {"loss": 1 / (done + 3)}) for done in range(min(step, 50))])


def store_with(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder / "store", "test")
    for step in steps:
        store.save(checkpoint(step))
    return store


def files(store: CheckpointStore) -> list[Path]:
    return sorted(path for path in store.folder.iterdir() if path.is_file())


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.curve) == (expected.step, expected.curve)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store_with(tmp_path, 7)
    assert_same(store_with(tmp_path).latest(), checkpoint(7))


def test_there_may_be_none(tmp_path: Path) -> None:
    assert store_with(tmp_path).latest() is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 100_000_000)
    assert [path.name.split("-")[1] for path in files(store)] == ["00000003", "100000000"]
    assert_same(store.latest(), checkpoint(100_000_000))


def damage(path: Path, how: str) -> None:
    content, draws = bytearray(path.read_bytes()), random.Random(how)
    if how.startswith("flipped"):
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    else:
        del content[0 if how == "empty" else draws.randrange(len(content)) :]
    path.write_bytes(content)


@pytest.mark.parametrize("how", [*(f"flipped {n}" for n in range(10)), *(f"truncated {n}" for n in range(5)), "empty"])
def test_a_damaged_one_is_told_of_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    store = store_with(tmp_path, 3, 5)
    damaged = files(store)[-1]
    damage(damaged, how)
    assert_same(store_with(tmp_path).latest(), checkpoint(3))
    assert capsys.readouterr().err == f"test: checkpoint {damaged} is damaged; the one before it is used\n"
    assert not damaged.exists()


def test_with_both_damaged_it_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in files(store_with(tmp_path, 3, 5)):
        damage(path, "truncated")
    assert store_with(tmp_path).latest() is None
    assert "there is no other: it starts anew" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, 3, 5)
    before = files(store)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        store.save(checkpoint(6))
    assert files(store) == before
    assert not (store.folder / ".new").exists()


def test_half_written_files_are_no_checkpoints(tmp_path: Path) -> None:
    store = store_with(tmp_path, 3)
    whole = files(store)[0]
    (store.folder / ".new").mkdir()
    (store.folder / ".new/checkpoint.safetensors").write_bytes(whole.read_bytes()[:100])
    (store.folder / whole.name.replace("00000003", "00000009").replace(".safetensors", ".tmp")).write_bytes(b"half")
    assert_same(store_with(tmp_path).latest(), checkpoint(3))


def test_a_checkpoint_counts_on_the_kept_files_of_its_steps_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_with(tmp_path)
    for step in (1, 2, 3):
        (store.kept_files / f"step-{step}").mkdir()
        (store.kept_files / f"step-{step}/model").write_text(f"model {step}")
        if step < 3:
            store.save(checkpoint(step))
    assert_same(store_with(tmp_path).latest(), checkpoint(2))
    assert sorted(path.read_text() for path in store.kept_files.rglob("model")) == ["model 1", "model 2"]
    (store.kept_files / "step-2/model").write_text("another")
    assert_same(store_with(tmp_path).latest(), checkpoint(1))
    assert "is damaged; the one before it is used" in capsys.readouterr().err
    assert not (store.kept_files / "step-2/model").exists()
    (store.kept_files / "step-1/model").unlink()
    assert store_with(tmp_path).latest() is None


def test_another_machine_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CheckpointStore(tmp_path, "test", {"threads": 2, "torch": "2.13"}).save(checkpoint(1))
    assert_same(CheckpointStore(tmp_path, "test", {"threads": 4, "torch": "2.13"}).latest(), checkpoint(1))
    told = "test: threads was 2 and is 4: the last digits will differ from those of an unbroken run\n"
    assert capsys.readouterr().err == told


def test_they_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that runs as steps and writing do, for cheap and for dear checkpoints."""
    now = 0.0
    # The module's clock alone: the threads of pytest's workers live by the real one.
    monkeypatch.setattr(calm_core.training.checkpoints, "time", SimpleNamespace(monotonic=lambda: now))
    for seconds_to_write in (0.05, 3.0, 40.0):
        store = CheckpointStore(tmp_path / f"{seconds_to_write}", "test")

        def save(tensors: Any, path: Path, metadata: Any, seconds: float = seconds_to_write) -> None:
            nonlocal now
            now += seconds
            path.write_bytes(b"checkpoint")

        monkeypatch.setattr(calm_core.training.checkpoints, "save_tensors", save)
        begin, writing, longest, last = now, 0.0, 0.0, now
        for step in range(1_500):
            now += 9.0
            if store.due():
                longest, before = max(longest, now - last), now
                store.save(checkpoint(0)._replace(step=step))
                writing, last = writing + now - before, now
        assert writing < 0.02 * (now - begin)
        assert longest < max(10, 100 * seconds_to_write) + 9.1


def run(
    params: Params, optimiser: str, folder: Path | None, stop_at: int | None = None, spoil: Any = None
) -> tuple[dict[str, Tensor], list[tuple[int, dict[str, float]]]]:
    """Train a small model, breaking off before step ``stop_at``; weights and curve."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    section = params.calm.model_copy(update={"steps": STEPS, "warmup_steps": 10, "optimiser": optimiser})
    curve: list[tuple[int, dict[str, float]]] = []

    def loss_at(model: nn.Module, step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise InterruptedError
        data = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(data) - data).square().mean()
        return {"loss": spoil(step, loss) if spoil else loss, "step": torch.tensor(float(step))}

    store = None if folder is None else CheckpointStore(folder, "test")

    def log(done: int, values: Mapping[str, float]) -> None:
        curve.append((done, dict(values)))

    with contextlib.suppress(InterruptedError):
        train(TinyObjective(model, loss_at), section, params.runtime, Run(log=log, checkpoints=store))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, curve


def every(steps: int) -> Any:
    """A ``due`` that is true after the first step, and then again and again after as many as ``steps``."""
    asked = itertools.count()
    return lambda self: next(asked) % steps == 0


@pytest.mark.parametrize("optimiser", sampled(["adamw", "muon"], "muon"))
def test_a_training_goes_on_with_the_same_numbers(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    monkeypatch.setattr(CheckpointStore, "due", every(9))
    weights, curve = run(params, optimiser, None)
    for stop_at in (2, 15, 349, STEPS - 1):  # from steps 1, 10, ...: between two points of the curve, and at one
        folder = tmp_path / f"{stop_at}"
        broken_off, _ = run(params, optimiser, folder, stop_at)
        assert any(not torch.equal(broken_off[name], weights[name]) for name in weights)
        found_weights, found_curve = run(params, optimiser, folder)
        assert found_curve == curve
        for name, tensor in weights.items():
            assert torch.equal(found_weights[name], tensor), (stop_at, name)


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        pytest.param(float("nan"), "test: the loss is nan at step 301 (rows 300)", marks=pytest.mark.slow),
        pytest.param(float("inf"), "test: the loss is inf at step 301 (rows 300)", marks=pytest.mark.slow),
        pytest.param(1e38, "test: the norm of the gradient is nan at step 301 (rows 300)", marks=pytest.mark.slow),
        (1e4, "test: the loss leaps to "),
    ],
)
def test_a_bad_step_is_named_and_never_kept(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, told: str
) -> None:
    def spoil(step: int, loss: Tensor) -> Tensor:
        return loss / loss.detach() * factor if step == 300 else loss

    # Some checkpoints fall between two points of the curve, one of them right after the bad step.
    monkeypatch.setattr(CheckpointStore, "due", every(3))
    with pytest.raises(CalmError) as error:
        run(params, "adamw", tmp_path, spoil=spoil)
    assert str(error.value).startswith(told)
    assert "at step 301 (rows 300); the checkpoint after step 298 is kept; lower the learning rates" in str(error.value)
    kept = CheckpointStore(tmp_path, "test").latest()
    assert kept is not None
    assert kept.step == 298
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    # With a good step in its place it ends as if the bad one had never been.
    weights, curve = run(params, "adamw", tmp_path)
    assert (weights["0.weight"] - run(params, "adamw", None)[0]["0.weight"]).abs().max() == 0
    assert curve[-1][0] == STEPS


def test_weights_that_are_no_longer_finite_are_never_kept(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointStore, "due", every(1))
    original = torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> None:
        original(self, closure)
        for state in self.state.values():
            if state["step"] == 7:
                state["exp_avg_sq"].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(CalmError, match=r"no longer finite at step 7 \(rows 6\); the checkpoint after step 6 is kept"):
        run(params, "adamw", tmp_path)
