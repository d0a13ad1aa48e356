"""What can go wrong beside a kill: each ends in one clear line, a status other than 0, and a project that can go on."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import needs_linux
from tests.reliability.support.faults import (
    fill_disk,
    limit_files,
    loss_at_step,
    out_of_memory_at_step,
    remount,
    save_every_step,
    stuck_at_step,
)
from tests.reliability.support.stage_processes import (
    ROOT,
    STAGES,
    Ended,
    fingerprint,
    remove_outputs,
    run_stage_process,
)
from tests.sampling import sampled

TRAININGS = ("train_autoencoder", "train_calm", "train_transformer")
EVALUATIONS = ("evaluate_calm", "evaluate_transformer", "correlate_brierlm", "measure_diversity")
READERS_OF_TOKENS = (*TRAININGS, "encode_corpus", *EVALUATIONS, "report")
OF_ONE_PAGE = (
    "check_params",
    "digest_corpus",
    "evaluate_calm",
    "evaluate_transformer",
    "evaluate_brierlm",
    "correlate_brierlm",
    "match_compute",
    "measure_diversity",
    "benchmark_flops",
    "model_cards",
)
"""Stages whose outputs take a few pages of memory each, or less."""


def complaint(ended: Ended, stage: str) -> str:
    """The one line in which ``ended`` says what went wrong."""
    assert ended.status > 0, ended.told
    assert "Traceback" not in ended.told
    lines = [line for line in ended.told.splitlines() if line.startswith(f"{stage}: ")]
    assert len(lines) == 1, ended.told
    return lines[0]


def assert_goes_on(project: Path, finished: Path, *stages: str) -> str:
    """Without the fault ``stages`` end with what they end with anyway; returns what they tell."""
    told = ""
    for stage in stages:
        ended = run_stage_process(project, stage)
        assert ended.status == 0, ended.told
        assert fingerprint(project, stage) == fingerprint(finished, stage)
        told += ended.told
    return told


@pytest.mark.parametrize("stage", sampled([stage for stage in STAGES if stage not in OF_ONE_PAGE], "train_calm"))
def test_a_quota(finished: Path, project: Path, stage: str) -> None:
    """No file may grow beyond half of the stage's largest output."""
    largest = max((finished / name).stat().st_size for name in fingerprint(finished, stage))
    told = complaint(run_stage_process(project, stage, partial(limit_files, largest // 2)), stage)
    assert "cannot write" in told
    assert "File too large; free some disk space" in told
    assert_goes_on(project, finished, stage)


@pytest.fixture()
def small_disk(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished project on a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root; test_a_quota makes writes fail without")
    try:
        yield Path(shutil.copytree(finished, disk / "project"))
    finally:
        subprocess.run(["umount", disk], check=True)


@needs_linux
@pytest.mark.parametrize("stage", sampled(STAGES, "encode_corpus"))
def test_a_full_disk(finished: Path, small_disk: Path, stage: str) -> None:
    free_bytes = 0 if stage in OF_ONE_PAGE else 1 << 14
    ended = run_stage_process(small_disk, stage, partial(fill_disk, small_disk, free_bytes))
    assert "free some disk space" in complaint(ended, stage)
    (small_disk.parent / "filler").unlink()
    assert_goes_on(small_disk, finished, stage)


@needs_linux
@pytest.mark.parametrize("stage", sampled(STAGES, "train_transformer"))
def test_a_read_only_disk(finished: Path, small_disk: Path, stage: str) -> None:
    ended = run_stage_process(small_disk, stage, partial(remount, small_disk.parent, "ro"))
    remount(small_disk.parent, "rw")
    assert "Read-only file system" in complaint(ended, stage)
    assert_goes_on(small_disk, finished, stage)


@needs_linux
@pytest.mark.parametrize("stage", sampled(TRAININGS, "train_transformer"))
def test_a_disk_that_fills_up_in_the_middle_of_a_training(finished: Path, small_disk: Path, stage: str) -> None:
    """Room for one checkpoint, not for a second."""
    assert run_stage_process(small_disk, stage, save_every_step).status == 0
    checkpoint = max(path.stat().st_size for path in small_disk.glob(".checkpoints/*/step-*.safetensors"))
    shutil.rmtree(small_disk / ".checkpoints")
    filled = partial(fill_disk, small_disk, checkpoint + checkpoint // 2 + (1 << 16))
    ended = run_stage_process(small_disk, stage, save_every_step, filled)
    assert "No space left on device" in complaint(ended, stage)
    (small_disk.parent / "filler").unlink()
    assert "goes on after step " in assert_goes_on(small_disk, finished, stage)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("stage", sampled(READERS_OF_TOKENS, "train_transformer"))
def test_a_corrupt_shard_of_tokens(finished: Path, project: Path, stage: str) -> None:
    flip(project / "data/tokens/train-00000.safetensors")
    told = complaint(run_stage_process(project, stage), stage)
    assert "data/tokens/train-00000.safetensors is damaged: its SHA-256 is not the one in description.json" in told
    remove_outputs(project, "tokenise")  # as the line says
    assert_goes_on(project, finished, "tokenise", stage)


@pytest.mark.parametrize("name", ["index.safetensors", "posteriors-00000.safetensors"])
def test_a_corrupt_shard_of_latents(finished: Path, of_latents: Path, name: str) -> None:
    flip(of_latents / "data/latents" / name)
    told = complaint(run_stage_process(of_latents, "train_calm"), "train_calm")
    assert f"data/latents/{name} is damaged" in told
    remove_outputs(of_latents, "encode_corpus")
    assert_goes_on(of_latents, finished, "encode_corpus")
    assert run_stage_process(of_latents, "train_calm").status == 0


def test_a_missing_and_a_foreign_shard(project: Path) -> None:
    shard = project / "data/tokens/train-00000.safetensors"
    shard.rename(shard.with_name("train-00001.safetensors"))
    assert f"{shard.relative_to(project)} is missing" in run_stage_process(project, "train_transformer").told
    shutil.copy(shard.with_name("train-00001.safetensors"), shard)
    told = complaint(run_stage_process(project, "train_transformer"), "train_transformer")
    assert "data/tokens/train-00001.safetensors is not named in description.json" in told


def test_latents_of_another_autoencoder(of_latents: Path) -> None:
    project, weights = of_latents, of_latents / "models/autoencoder/model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights)
    told = complaint(run_stage_process(project, "train_calm"), "train_calm")
    assert "data/latents was not made from models/autoencoder/model.safetensors; run `dvc repro --force" in told
    assert run_stage_process(project, "encode_corpus").status == 0
    assert run_stage_process(project, "train_calm").status == 0


@pytest.mark.parametrize(
    ("stage", "model"),
    sampled(
        [
            ("encode_corpus", "autoencoder"),
            ("train_calm", "autoencoder"),
            ("evaluate_calm", "calm"),
            ("evaluate_transformer", "transformer"),
            ("report", "transformer"),
        ],
        ("encode_corpus", "autoencoder"),
    ),
)
def test_a_tokenizer_that_did_not_make_the_tokens(finished: Path, project: Path, stage: str, model: str) -> None:
    tokenizer = project / "models" / model / "tokenizer.json"
    good = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(good + " ", encoding="utf-8")
    told = complaint(run_stage_process(project, stage), stage)
    assert f"models/{model}/tokenizer.json is not the tokenizer that made data/tokens; " in told
    tokenizer.write_text(good, encoding="utf-8")
    assert_goes_on(project, finished, stage)


def test_a_tokenizer_that_changed_after_it_made_the_tokens(project: Path) -> None:
    tokenizer = project / "data/tokens/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    told = complaint(run_stage_process(project, "train_autoencoder"), "train_autoencoder")
    assert "data/tokens/tokenizer.json is damaged" in told


@pytest.mark.parametrize("stage", sampled(TRAININGS, "train_calm"))
@pytest.mark.parametrize(
    ("factor", "what"),
    [
        (float("nan"), "the loss is nan at step 5 "),
        (float("inf"), "the loss is inf at step 5 "),
        (1e5, "the loss leaps to "),
    ],
)
def test_a_bad_loss(finished: Path, project: Path, stage: str, factor: float, what: str) -> None:
    told = complaint(run_stage_process(project, stage, save_every_step, partial(loss_at_step, 5, factor)), stage)
    assert what in told
    items = "patches" if stage == "train_autoencoder" else "sequences"
    assert f"at step 5 ({items} from tokens " in told
    assert "of the training split); the checkpoint after step 4 is kept; lower the learning rates" in told
    assert "goes on after step 4 of" in assert_goes_on(project, finished, stage)


@needs_linux
@pytest.mark.parametrize("stage", sampled(TRAININGS, "train_transformer"))
def test_out_of_memory(finished: Path, project: Path, stage: str) -> None:
    told = complaint(run_stage_process(project, stage, save_every_step, partial(out_of_memory_at_step, 5)), stage)
    assert (
        "out of memory (tried to allocate 4503599627370496 bytes); lower the batch or the model in params.yaml" in told
    )
    assert "goes on after step 4 of" in assert_goes_on(project, finished, stage)


@pytest.mark.parametrize(
    ("which", "status"), sampled([(signal.SIGINT, 130), (signal.SIGTERM, 143)], (signal.SIGINT, 130))
)
def test_a_step_that_does_not_end_is_left_in_time(
    finished: Path, project: Path, which: signal.Signals, status: int
) -> None:
    ended = run_stage_process(project, "train_calm", save_every_step, partial(stuck_at_step, 5, which))
    assert ended.status == status
    assert "in the middle of a step; `dvc repro` goes on from what is saved" in complaint(ended, "train_calm")
    assert "goes on after step 4 of" in assert_goes_on(project, finished, "train_calm")


def test_a_stage_runs_once_at_a_time(finished: Path, project: Path) -> None:
    """The stage of a DVC that was killed may still be at work."""
    with (project / ".checkpoints/train_calm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (project / ".checkpoints/train_calm.pid").write_text("4711")
        told = complaint(run_stage_process(project, "train_calm"), "train_calm")
    assert "process 4711 runs this stage here already; wait for it or stop it" in told
    assert_goes_on(project, finished, "train_calm")


@pytest.mark.slow
def test_a_stage_that_dies_under_dvc(finished: Path, project: Path, tmp_path: Path) -> None:
    """The real thing: `dvc repro`, a killed worker process, `dvc repro` again."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.orig_argv[-1] == 'stages.train_transformer':\n"
        "    from tests.reliability.support import faults\n"
        "    faults.save_every_step()\n"
        "    faults.kill_at_step(6)\n"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def repro(*python_path: Path) -> subprocess.CompletedProcess[str]:
        path = ":".join(map(str, (*python_path, ROOT)))
        command = ["dvc", "repro", "train_transformer"]
        return subprocess.run(
            command, cwd=project, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
        )

    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (project / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "--all"), (*identity, "commit", "--quiet", "--message", "project")):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    killed = repro(tmp_path)
    assert killed.returncode != 0
    assert "failed to reproduce 'train_transformer'" in killed.stdout + killed.stderr
    ended = repro()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "goes on after step 5 of 12" in ended.stderr
    assert "Running stage 'tokenise'" not in ended.stdout
    assert fingerprint(project, "train_transformer") == fingerprint(finished, "train_transformer")


def test_checkpoints_go_once_the_next_stage_begins(project: Path) -> None:
    assert run_stage_process(project, "train_transformer").status == 0
    (folder,) = project.glob(".checkpoints/train_transformer-*/")
    assert run_stage_process(project, "digest_corpus").status == 0  # with which each `dvc repro` begins
    again = run_stage_process(project, "train_transformer")  # as after a DVC that found no room for the outputs
    assert "goes on after step 12 of 12" in again.told
    assert run_stage_process(project, "evaluate_brierlm").status == 0
    assert not folder.exists()


def test_other_params_other_checkpoints(finished: Path, project: Path) -> None:
    """An interrupted training waits for its params to come back, and says that it is there."""
    killed = run_stage_process(project, "train_calm", save_every_step, partial(loss_at_step, 5, float("nan")))
    assert killed.status == 1
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("alpha: 1.0", "alpha: 1.5"))
    other = run_stage_process(project, "train_calm")
    assert other.status == 0
    assert "goes on" not in other.told
    assert ".checkpoints keeps 1 interrupted with other params, code or inputs" in other.told
    params.write_text(before)
    assert "goes on after step 4 of" in assert_goes_on(project, finished, "train_calm")
    (project / "calm_core/calm/head.py").open("a").write("# other code\n")
    assert "goes on" not in run_stage_process(project, "train_calm").told
