"""Every stage, killed at random moments, ends as if nothing had happened once it runs again."""

import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.faults import (
    count_file_events,
    kill_at_file_event,
    kill_at_step,
    kill_in_file_above,
    save_every_step,
    signal_at_step,
)
from tests.reliability.stage_processes import STAGES, fingerprint, run_stage_process

TRAININGS = {"train_autoencoder": 30, "train_calm": 12, "train_transformer": 12}
"""Each training with its steps, see presets/smoke.yaml."""

MOMENTS = 20
MOMENTS_OF_OTHERS = dict.fromkeys(("tokenise", "encode_corpus", "evaluate_brierlm", "correlate_brierlm"), 5)
"""Of the stages that take long on a real corpus; the rest write a file or three, and die twice."""


def moments(stage: str, kind: str, most: int, count: int) -> list[int]:
    """``count`` moments of 1 to ``most``, drawn anew for each stage and kind."""
    return sorted(random.Random(f"{stage} {kind}").sample(range(1, most + 1), count))


def file_events(project: Path, stage: str) -> int:
    count = project / "events"
    ended = run_stage_process(project, stage, save_every_step, partial(count_file_events, count))
    assert ended.status == 0, ended.told
    shutil.rmtree(project / ".checkpoints")
    return count.stat().st_size


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_killed_training_ends_with_the_same_weights(finished: Path, project: Path, stage: str) -> None:
    expected, steps = fingerprint(finished, stage), TRAININGS[stage]
    events = file_events(project, stage)
    assert fingerprint(project, stage) == expected  # a checkpoint a step changes nothing
    run_stage_process(project, stage, save_every_step, partial(kill_at_step, steps))
    largest = max(path.stat().st_size for path in project.glob(".checkpoints/*/step-*.safetensors"))
    kills = [
        *(partial(kill_at_step, step) for step in moments(stage, "step", steps, 7)),
        *(partial(kill_at_file_event, event) for event in moments(stage, "file", events, 7)),
        *(partial(kill_in_file_above, size) for size in moments(stage, "write", largest - 1, 6)),
    ]
    assert len(kills) == MOMENTS
    for kill in kills:
        shutil.rmtree(project / ".checkpoints")
        killed = run_stage_process(project, stage, save_every_step, kill)
        assert -killed.status in (signal.SIGKILL, signal.SIGXFSZ), (kill, killed)
        ended = run_stage_process(project, stage)
        assert ended.status == 0, (kill, ended.told)
        assert fingerprint(project, stage) == expected, kill
        if kill.func is kill_at_step and kill.args[0] > 1:
            assert f"goes on after step {kill.args[0] - 1} of {steps}\n" in ended.told


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_training_killed_again_and_again_gets_there(finished: Path, project: Path, stage: str) -> None:
    lives = 0
    while run_stage_process(project, stage, save_every_step, partial(kill_at_step, 3)).status == -signal.SIGKILL:
        lives += 1
    assert lives == (TRAININGS[stage] - 1) // 2
    assert fingerprint(project, stage) == fingerprint(finished, stage)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in TRAININGS])
def test_any_other_killed_stage_starts_anew(finished: Path, project: Path, stage: str) -> None:
    expected = fingerprint(finished, stage)
    for event in moments(stage, "file", file_events(project, stage), MOMENTS_OF_OTHERS.get(stage, 2)):
        killed = run_stage_process(project, stage, partial(kill_at_file_event, event))
        assert killed.status == -signal.SIGKILL
        left = fingerprint(project, stage)
        assert left.items() <= expected.items(), "a file that is not whole under its final name"
        ended = run_stage_process(project, stage)
        assert ended.status == 0, ended.told
        assert fingerprint(project, stage) == expected


@pytest.mark.parametrize("stage", ["tokenise", "encode_corpus"])
def test_shards_that_are_not_whole_are_never_seen(finished: Path, project: Path, stage: str) -> None:
    expected = fingerprint(finished, stage)
    largest = max((project / name).stat().st_size for name in expected)
    for size in moments(stage, "write", largest - 1, MOMENTS_OF_OTHERS[stage]):
        killed = run_stage_process(project, stage, partial(kill_in_file_above, size))
        assert killed.status == -signal.SIGXFSZ
        assert fingerprint(project, stage) == expected  # what stood there before, whole
    ended = run_stage_process(project, stage)
    assert ended.status == 0, ended.told
    assert fingerprint(project, stage) == expected
    assert not list((project / "data").glob(".*"))


@pytest.mark.parametrize(("which", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", TRAININGS)
def test_ctrl_c_and_sigterm_save_the_step_and_leave(
    finished: Path, project: Path, stage: str, which: signal.Signals, status: int
) -> None:
    stopped = run_stage_process(project, stage, partial(signal_at_step, 5, which))
    assert stopped.status == status, stopped.told
    told = [line for line in stopped.told.splitlines() if "tokens" not in line]  # lines of progress left out
    assert told == [f"{stage}: stopped by {'Ctrl-C' if status == 130 else 'SIGTERM'}; `dvc repro` goes on"]
    ended = run_stage_process(project, stage)
    assert f"goes on after step 5 of {TRAININGS[stage]}\n" in ended.told
    assert fingerprint(project, stage) == fingerprint(finished, stage)
