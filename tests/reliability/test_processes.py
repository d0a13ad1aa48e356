"""Training in several processes: the numbers of one, whoever saved the checkpoint, whoever dies."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from calm_core.runtime.process_group import ProcessGroup
from calm_core.training.batches import batch_indices
from tests import needs_linux
from tests.reliability.support.faults import (
    kill_at_shard,
    kill_at_step,
    loss_at_step,
    record_gathered,
    record_hashes,
    record_windows,
    save_every_step,
    small_shards,
)
from tests.reliability.support.stage_processes import (
    BY_PROCESSES,
    ROOT,
    Ended,
    Fault,
    fingerprint,
    run_stage_process,
    run_stage_processes,
)
from tests.sampling import sampled

TRAININGS = ("train_autoencoder", "train_calm", "train_transformer")


def set_params(folder: Path, **sections: dict[str, Any]) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in sections.items():
        params[section].update(values)
    path.write_text(yaml.safe_dump(params), encoding="utf-8")


def curves(folder: Path, stage: str) -> dict[str, list[float]]:
    tables = (folder / "results/training" / stage.removeprefix("train_") / "plots/metrics").glob("*.tsv")
    return {
        table.stem: [float(line.split("\t")[1]) for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        for table in tables
    }


def forget_checkpoints(folder: Path) -> None:
    """Of a stage that has just run, from which a run with other processes would go on."""
    shutil.rmtree(folder / ".checkpoints")


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / stage.removeprefix("train_") / "model.safetensors")


def assert_done(ended: Sequence[Ended]) -> None:
    assert [one.status for one in ended] == [0] * len(ended), [one.told for one in ended]


def assert_same_run(folder: Path, expected: Path, stage: str, relative: float = 1e-4) -> None:
    """The loss curves agree; the other curves are of the same steps."""
    found, wanted = curves(folder, stage), curves(expected, stage)
    assert found.keys() == wanted.keys()
    assert {name: len(values) for name, values in found.items()} == {name: len(one) for name, one in wanted.items()}
    assert found["loss"] == pytest.approx(wanted["loss"], rel=relative)


ALONE_IN_PASSES = (1, {"gradient_accumulation": 2, "activation_checkpointing": True})
COPIES = (2, {"parallelism": "ddp"})
SHARDS_IN_PASSES = (2, {"parallelism": "fsdp", "gradient_accumulation": 2, "activation_checkpointing": True})
FOUR_COPIES, FOUR_SHARDS = (4, {"parallelism": "ddp"}), (4, {"parallelism": "fsdp"})


@pytest.mark.parametrize(
    ("stage", "count", "runtime"),
    sampled(
        [
            *((stage, *how) for stage in TRAININGS for how in (ALONE_IN_PASSES, COPIES, SHARDS_IN_PASSES)),
            ("train_autoencoder", *FOUR_COPIES),
            ("train_calm", *FOUR_SHARDS),
            ("train_transformer", *FOUR_SHARDS),
        ],
        ("train_transformer", *COPIES),
        ("train_calm", *SHARDS_IN_PASSES),
    ),
)
def test_the_loss_curve_is_that_of_one_process(
    finished: Path, project: Path, stage: str, count: int, runtime: dict[str, Any]
) -> None:
    set_params(project, runtime=runtime)
    ended = run_stage_processes(project, stage, [()] * count)
    assert_done(ended)
    assert_same_run(project, finished, stage)
    expected = weights(finished, stage)
    for name, tensor in weights(project, stage).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)
    # One process tells what a stage tells; the others are silent.
    assert [bool(one.told) for one in ended] == [True] + [False] * (count - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"calm": {"head": "diffusion"}},
        {"calm": {"head": "flow", "optimiser": "adamw"}},
        {"calm": {"head": "energy", "input": "latents", "optimiser": "adamw"}},
        {"runtime": {"precision": "bfloat16"}},
    ],
    ids=["diffusion", "flow-adamw", "latents-adamw", "bfloat16"],
)
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_whatever_is_trained(
    project: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], parallelism: str
) -> None:
    set_params(project, **changes)
    assert_done([run_stage_process(project, "train_calm")])
    alone = Path(shutil.copytree(project, tmp_path / "alone"))
    forget_checkpoints(project)
    set_params(project, runtime={"parallelism": parallelism})
    assert_done(run_stage_processes(project, "train_calm", [(), ()]))
    assert_same_run(project, alone, "train_calm", 1e-2 if "runtime" in changes else 1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    sampled([("bfloat16", "torch.bfloat16"), ("float32", "torch.float32")], ("bfloat16", "torch.bfloat16")),
)
def test_shards_are_gathered_in_the_precision_of_products(
    project: Path, tmp_path: Path, precision: str, dtype: str
) -> None:
    set_params(project, runtime={"parallelism": "fsdp", "precision": precision})
    paths = [tmp_path / "0", tmp_path / "1"]
    assert_done(run_stage_processes(project, "train_calm", [[partial(record_gathered, path)] for path in paths]))
    for path in paths:
        # Layers, whose norms compute in float32 all the same; and what lies outside of them.
        assert path.read_text(encoding="utf-8").split() == [dtype, "torch.float32", "torch.float32"]
    assert {weight.dtype for weight in weights(project, "train_calm").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    sampled(
        [
            ("train_autoencoder", (2, "fsdp"), (1, "ddp")),
            ("train_calm", (2, "fsdp"), (4, "ddp")),
            ("train_calm", (1, "ddp"), (2, "fsdp")),
            ("train_transformer", (2, "ddp"), (4, "fsdp")),
        ],
        ("train_autoencoder", (2, "fsdp"), (1, "ddp")),
    ),
)
def test_a_checkpoint_of_some_processes_serves_others(
    finished: Path, project: Path, stage: str, before: tuple[int, str], after: tuple[int, str]
) -> None:
    set_params(project, runtime={"parallelism": before[1]})
    faults: list[list[Fault]] = [[save_every_step, partial(kill_at_step, 9)]] * before[0]
    assert [one.status for one in run_stage_processes(project, stage, faults)] == [-signal.SIGKILL] * before[0]
    set_params(project, runtime={"parallelism": after[1]})
    ended = run_stage_processes(project, stage, [()] * after[0])
    assert_done(ended)
    assert "goes on after step 8" in ended[0].told
    assert f"processes was {before[0]} and is {after[0]}" in ended[0].told
    assert_same_run(project, finished, stage)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_a_batch(count: int) -> None:
    shares = [ProcessGroup(rank, count).chunk(8) for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(8))
    epoch = [batch_indices(step, 8, 24, 0, "stage")[share.start : share.stop] for share in shares for step in range(3)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(24))


def test_each_sequence_is_read_by_one_process(project: Path, tmp_path: Path) -> None:
    def starts(count: int) -> list[list[int]]:
        forget_checkpoints(project)
        paths = [tmp_path / f"{count}-{rank}" for rank in range(count)]
        faults = [[partial(record_windows, path)] for path in paths]
        assert_done(run_stage_processes(project, "train_transformer", faults))
        return [[int(line) for line in path.read_text(encoding="utf-8").split()] for path in paths]

    (alone,) = starts(1)
    by_two = starts(2)
    assert sorted(by_two[0] + by_two[1]) == sorted(alone)
    assert len(by_two[0]) == len(by_two[1])
    assert len(set(alone)) == len(alone)  # fewer steps than an epoch has: nothing comes twice


def test_a_batch_that_cannot_be_shared_is_refused(project: Path) -> None:
    ended = run_stage_processes(project, "train_transformer", [()] * 3)
    assert [one.status for one in ended] == [1, 1, 1]
    assert ended[0].told == (
        "train_transformer: transformer: a batch of 4 is not divisible by 3 processes times "
        "runtime.gradient_accumulation 1; change one of them\n"
    )


def test_a_bad_loss_of_one_process_stops_all_at_the_same_step(project: Path) -> None:
    bad: list[Fault] = [save_every_step, partial(loss_at_step, 6, float("nan"))]
    ended = run_stage_processes(project, "train_transformer", [[save_every_step], bad])
    assert [one.status for one in ended] == [1, 1], ended
    assert "transformer: the loss is nan at step 6 (sequences from tokens " in ended[0].told
    assert "the checkpoint after step 5 is kept" in ended[0].told
    ended = run_stage_processes(project, "train_transformer", [(), ()])
    assert_done(ended)
    assert "goes on after step 5" in ended[0].told


def test_processes_encode_a_corpus_as_one_does(project: Path) -> None:
    assert_done([run_stage_process(project, "encode_corpus", small_shards)])
    expected = fingerprint(project, "encode_corpus")
    assert len(expected) > 6
    forget_checkpoints(project)
    killed = run_stage_processes(project, "encode_corpus", [[small_shards], [small_shards, partial(kill_at_shard, 2)]])
    assert [one.status for one in killed] == [1, -signal.SIGKILL]
    ended = run_stage_processes(project, "encode_corpus", [[small_shards]] * 3)
    assert_done(ended)
    assert "encode_corpus: goes on after" in ended[0].told
    assert fingerprint(project, "encode_corpus") == expected


@pytest.mark.parametrize("stage", sampled(BY_PROCESSES, "train_calm"))
def test_inputs_are_hashed_by_the_first_process_alone(of_latents: Path, tmp_path: Path, stage: str) -> None:
    paths = [tmp_path / f"hashed-{rank}" for rank in range(2)]
    assert_done(run_stage_processes(of_latents, stage, [[partial(record_hashes, path)] for path in paths]))
    hashed, by_other = (path.read_text(encoding="utf-8").splitlines() for path in paths)
    assert {"data/tokens/train-00000.safetensors", "data/tokens/tokenizer.json"} <= set(hashed)
    assert ("data/latents/posteriors-00000.safetensors" in hashed) == (stage == "train_calm")
    assert by_other == []


@pytest.mark.parametrize("stage", sampled(BY_PROCESSES, "train_transformer"))
def test_what_the_first_process_finds_ends_all_in_one_line(project: Path, stage: str) -> None:
    damage(project)
    ended = run_stage_processes(project, stage, [(), (), ()])
    assert [one.status for one in ended] == [1, 1, 1]
    assert ended[0].told == f"{stage}: {DAMAGED}\n"
    assert [one.told for one in ended[1:]] == ["", ""]


DAMAGED = (
    "data/tokens/train-00000.safetensors is damaged: its SHA-256 is not the one in description.json; "
    "delete data/tokens and run `dvc repro`"
)


def damage(project: Path) -> None:
    shard = project / "data/tokens/train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")


# From here on torchrun itself starts the processes.

FAULTY = """
import os
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    from functools import partial
    from tests.reliability.support import faults
    faults.save_every_step()
    if os.environ["RANK"] == "1":
        {fault}
"""


@pytest.fixture()
def launched(project: Path) -> Iterator[Any]:
    """A function that starts a command in ``project`` whose process number 1 does ``fault``."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, fault: str = "pass") -> subprocess.Popen[str]:
        (project / "faulty").mkdir(exist_ok=True)
        (project / "faulty/sitecustomize.py").write_text(FAULTY.format(fault=fault), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": f"{project / 'faulty'}:{ROOT}"}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=project, env=environment, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


STAGE = ("-m", "stages.train_transformer")


def test_torchrun_by_params(finished: Path, project: Path, launched: Any) -> None:
    set_params(project, runtime={"launcher": "torchrun", "processes": 2})
    process = launched(*STAGE)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    assert_same_run(project, finished, "train_transformer")
    assert told.count("train_transformer: done in") == 1


@pytest.mark.slow
def test_torchrun_adds_nothing_to_what_the_first_process_finds(project: Path, launched: Any) -> None:
    damage(project)
    set_params(project, runtime={"launcher": "torchrun", "processes": 2})
    process = launched(*STAGE)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert told == f"train_transformer: {DAMAGED}\n"


@pytest.mark.slow
def test_one_killed_process_ends_all_and_the_next_run_goes_on(finished: Path, project: Path, launched: Any) -> None:
    set_params(project, runtime={"launcher": "torchrun", "processes": 2})
    process = launched(*STAGE, fault="faults.kill_at_step(6)")
    told = process.communicate(timeout=60)[1]  # the start of both included; the end is to take 30 at most
    assert process.returncode == 1
    assert told.splitlines()[-1] == (
        "train_transformer: process 2 of 2 was killed by SIGKILL; `dvc repro` goes on from what is saved"
    )
    assert "Traceback" not in told
    process = launched(*STAGE)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    assert "goes on after step 5 of" in told
    assert_same_run(project, finished, "train_transformer")


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(finished: Path, project: Path, launched: Any) -> None:
    arguments = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    process = launched("-m", "torch.distributed.run", *arguments, *STAGE, fault="faults.kill_at_step(6)")
    told = process.communicate()[1]
    assert process.returncode == 0, told
    assert "goes on after step 5 of" in told
    assert_same_run(project, finished, "train_transformer")


@needs_linux
@pytest.mark.slow
def test_a_mistake_that_one_process_alone_sees_is_told(project: Path, launched: Any) -> None:
    set_params(project, runtime={"launcher": "torchrun", "processes": 2})
    process = launched(*STAGE, fault="faults.out_of_memory_at_step(3)")
    told = process.communicate()[1]
    assert process.returncode == 1
    assert told.splitlines()[-1].startswith("process 2 of 2: train_transformer: out of memory")
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(("which", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_launcher_leaves_no_process(project: Path, launched: Any, which: signal.Signals, status: int) -> None:
    """The signal comes from one of the processes, in the middle of its step 6."""
    set_params(project, runtime={"launcher": "torchrun", "processes": 2})
    act = f"faults.at_step(6, lambda: os.kill(os.getppid(), {int(which)}))"
    process = launched(*STAGE, fault=act)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "Traceback" not in told
    if which != signal.SIGKILL:
        assert told.splitlines()[-1] == f"train_transformer: stopped by {which.name}; `dvc repro` goes on"
    # The pipe of standard error has closed, so all that had it open are gone; and none is found.
    assert not [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(project)]
    ended = run_stage_process(project, "train_transformer")
    assert_done([ended])
    assert "goes on after step" in ended.told
