"""The plan on paper against closed forms, a ring walked through step by step, and ``calm plan``."""

import math

import numpy as np
import pytest

from benchmarks import scaling_plan
from benchmarks.scaling_plan import (
    ddp_bytes,
    estimate,
    fsdp_bytes,
    paper_tables,
    ring_seconds,
    sequences_at_once,
)
from calm_core.costs.plan import DeviceMemory, ModelPlan
from calm_core.params import Params
from calm_core.presets import load_preset
from tests import ROOT

GIGABYTE = 10**9
P = 10**9
MEMORY = DeviceMemory(
    weights_bytes=4 * GIGABYTE,
    gradients_bytes=4 * GIGABYTE,
    optimiser_bytes=8 * GIGABYTE,
    frozen_bytes=GIGABYTE,
    weight_copies_bytes=2 * GIGABYTE,
    activations_bytes=5 * GIGABYTE,
)


@pytest.fixture()
def params(monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(ROOT)
    return load_preset("calm-m")


def model_of(params: Params) -> ModelPlan:
    return ModelPlan(
        parameters=P,
        training_tokens=params.calm.training_tokens,
        training_flops=4e20,
        inference_flops_per_token=1e9,
        training_hours=4e20 / (989e12 * 0.4) / 3600,
        memory_ddp=MEMORY,
        memory_sharded=MEMORY,
        micro_batch=1,
        micro_batch_bytes=MEMORY.total_bytes,
    )


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_that_sums_gradients_sends_that_much(gpus: int) -> None:
    # Chunks travel round the ring twice: n - 1 steps that add them up, n - 1 steps that hand the sums on.
    parameters = 24
    chunks = np.random.default_rng(0).normal(size=(gpus, gpus, parameters // gpus)).astype(np.float32)
    total, sent = chunks.sum(axis=0), 0
    for step in range(2 * (gpus - 1)):
        moving = [chunks[rank, (rank - step) % gpus].copy() for rank in range(gpus)]
        for rank, chunk in enumerate(moving):
            place = (rank + 1) % gpus, (rank - step) % gpus
            chunks[place] = chunk + (chunks[place] if step < gpus - 1 else 0)
        sent += moving[0].nbytes
    np.testing.assert_allclose(chunks, np.broadcast_to(total, chunks.shape), rtol=1e-4, atol=1e-5)
    assert sent == ddp_bytes(parameters, gpus)


def test_fsdp_sends_as_much_as_ddp_a_pass() -> None:
    # Two gathers of bf16 and one scatter of float32 are the 8 bytes a parameter of an all-reduce in float32.
    assert fsdp_bytes(P, 64, 1) == ddp_bytes(P, 64) == pytest.approx(63 / 64 * 8 * P)
    assert fsdp_bytes(P, 64, 5) == pytest.approx(5 * 63 / 64 * 8 * P)


def test_the_slowest_link_sets_the_pace() -> None:
    assert ring_seconds(36e9, 8) == pytest.approx(36 / (450 * 0.8))
    # Eight ports of 50 GB/s a node.
    assert ring_seconds(36e9, 9) == ring_seconds(36e9, 1024) == pytest.approx(36 / (400 * 0.8))


@pytest.mark.parametrize(
    ("limit", "share", "expected"), [(72, 100, 8), (72, 4, 4), (72, 3, 2), (24, 100, 1), (28.9, 100, 1), (23.9, 9, 0)]
)
def test_what_fits_at_once(limit: float, share: int, expected: int) -> None:
    # 19 GB that do not depend on the batch, and 5 GB a sequence.
    assert sequences_at_once(MEMORY, share, limit * GIGABYTE) == expected


def test_an_estimate_by_hand(params: Params) -> None:
    model = model_of(params)
    row = estimate("model", params, model, 64, "DDP")
    assert (row.sequences, row.at_once) == (256, 4)
    assert row.memory_bytes == (19 + 4 * 5) * GIGABYTE
    assert row.compute_seconds == pytest.approx(4e20 / 250_000 / (64 * 989e12 * 0.4))
    assert row.communication_seconds == pytest.approx(2 * 63 / 64 * 4e9 / (400e9 * 0.8))
    assert row.hours == pytest.approx(model.training_hours / 64 + 250_000 * row.communication_seconds / 3600)

    spread = estimate("model", params, model, 8, "FSDP")
    assert spread.at_once == 8  # of 32, so 4 passes, beside 2 + 1 + 2 GB
    assert spread.memory_bytes == (5 + 8 * 5) * GIGABYTE
    assert spread.sent_bytes == pytest.approx(4 * 7 / 8 * 8 * P)


def test_more_gpus_than_sequences_make_fewer_and_larger_steps(params: Params) -> None:
    model = model_of(params)
    few, many = (estimate("model", params, model, gpus, "DDP") for gpus in (256, 1024))
    assert (few.sequences, many.sequences) == (256, 1024)
    assert many.compute_seconds == pytest.approx(few.compute_seconds)
    assert many.hours == pytest.approx(few.hours / 4, rel=0.01)


def test_tables_have_a_row_for_every_model_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scaling_plan, "MODELS", ("smoke",))
    text, rows = paper_tables()
    tables = [part.splitlines() for part in text.split("\n\n")]
    assert [len(lines) for lines in tables] == [3, 3, 2 + 8]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
    assert [(row.gpus, row.way) for row in rows[:3]] == [(8, "DDP"), (8, "FSDP"), (64, "DDP")]
    assert all(math.isfinite(row.hours) and row.at_once >= 1 for row in rows)
