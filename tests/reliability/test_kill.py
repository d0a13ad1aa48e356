"""Every stage, killed at random moments, ends as if nothing had happened once it runs again."""

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.support.faults import (
    SHARD,
    count_file_events,
    kill_at_file_event,
    kill_at_shard,
    kill_at_step,
    kill_in_file_above,
    name_written_files,
    save_every_step,
    signal_at_file_event,
    signal_at_step,
    small_shards,
)
from tests.reliability.support.stage_processes import DATA_STAGES, STAGES, Fault, fingerprint, run_stage_process
from tests.sampling import sampled

TRAININGS = {"train_autoencoder": 30, "train_calm": 12, "train_transformer": 12}
"""Each training with its steps, see presets/smoke.yaml."""

OTHERS = [stage for stage in STAGES if stage not in (*TRAININGS, *DATA_STAGES)]

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
"""Each with the status of a stage that it stops."""

MOMENTS = 20
MOMENTS_OF_DATA = 5
OTHERS_THAT_TAKE_LONG = ("evaluate_calm", "evaluate_transformer", "correlate_brierlm", "measure_diversity")
MOMENTS_OF_OTHERS = dict.fromkeys(OTHERS_THAT_TAKE_LONG, 5)
"""Of the stages that take long on a real corpus; the rest write a file or three, and die twice."""


def moments(stage: str, kind: str, most: int, count: int) -> list[int]:
    """``count`` moments of 1 to ``most``, drawn anew for each stage and kind."""
    return sorted(random.Random(f"{stage} {kind}").sample(range(1, most + 1), count))


def file_events(project: Path, stage: str, *settings: Fault) -> int:
    count = project / "events"
    ended = run_stage_process(project, stage, *settings, partial(count_file_events, count))
    assert ended.status == 0, ended.told
    shutil.rmtree(project / ".checkpoints")
    return count.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
def test_a_killed_training_ends_with_the_same_weights(finished: Path, project: Path, stage: str) -> None:
    expected, steps = fingerprint(finished, stage), TRAININGS[stage]
    events = file_events(project, stage, save_every_step)
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


@pytest.mark.parametrize("stage", sampled(TRAININGS, "train_calm"))
def test_a_training_killed_again_and_again_gets_there(finished: Path, project: Path, stage: str) -> None:
    lives = 0
    while run_stage_process(project, stage, save_every_step, partial(kill_at_step, 3)).status == -signal.SIGKILL:
        lives += 1
    assert lives == (TRAININGS[stage] - 1) // 2
    assert fingerprint(project, stage) == fingerprint(finished, stage)


def finished_shards(project: Path, stage: str) -> set[str]:
    """Names of the shards that an interrupted stage will not make again."""
    if stage == "tokenise":
        records = [json.loads(path.read_text()) for path in project.glob(".checkpoints/tokenise-*/stretch-*.json")]
        return {name for record in records for names in record["sha256"].values() for name in names}
    paths = project.glob(".checkpoints/encode_corpus-*/posteriors-*.safetensors")
    return {f"{path.name.rpartition('-')[0]}.safetensors" for path in paths}


def assert_goes_on_in_shards(project: Path, stage: str, expected: dict[str, str]) -> None:
    """The stage, run again after it was killed, makes the shards that are missing, and those alone."""
    there, written = finished_shards(project, stage), project / "written"
    ended = run_stage_process(project, stage, small_shards, partial(name_written_files, written))
    assert ended.status == 0, ended.told
    assert fingerprint(project, stage) == expected
    shards = {Path(name).name for name in expected if SHARD.search(name)}
    assert set(written.read_text().split()) & shards == shards - there
    if there:
        told = (
            f"{stage}: goes on after {len(there)} {'shards, ' if stage == 'tokenise' else f'of {len(shards)} shards'}"
        )
        assert told in ended.told


@pytest.mark.parametrize("stage", sampled(DATA_STAGES, "encode_corpus"))
def test_a_killed_data_stage_goes_on(finished_in_shards: Path, in_shards: Path, stage: str) -> None:
    expected = fingerprint(finished_in_shards, stage)
    found = []
    for event in moments(stage, "file", file_events(in_shards, stage, small_shards), MOMENTS_OF_DATA):
        shutil.rmtree(in_shards / ".checkpoints", ignore_errors=True)
        killed = run_stage_process(in_shards, stage, small_shards, partial(kill_at_file_event, event))
        assert killed.status == -signal.SIGKILL
        left = fingerprint(in_shards, stage)
        assert left.items() <= expected.items(), "a file that is not whole under its final name"
        found.append(len(finished_shards(in_shards, stage)))
        assert_goes_on_in_shards(in_shards, stage, expected)
    assert len(set(found)) > 2, "moments that tell little"


@pytest.mark.parametrize("stage", sampled(DATA_STAGES, "tokenise"))
def test_a_data_stage_killed_again_and_again_gets_there(finished_in_shards: Path, in_shards: Path, stage: str) -> None:
    lives = finished = 0
    while run_stage_process(in_shards, stage, small_shards, partial(kill_at_shard, 4)).status == -signal.SIGKILL:
        before, finished = finished, len(finished_shards(in_shards, stage))
        assert before < finished <= before + 3
        lives += 1
    assert lives >= 3
    assert fingerprint(in_shards, stage) == fingerprint(finished_in_shards, stage)


@pytest.mark.parametrize(("which", "status"), sampled(SIGNALS, SIGNALS[0]))
@pytest.mark.parametrize("stage", sampled(DATA_STAGES, "tokenise"))
def test_a_data_stage_that_is_stopped_goes_on(
    finished_in_shards: Path, in_shards: Path, stage: str, which: signal.Signals, status: int
) -> None:
    stopped = run_stage_process(in_shards, stage, small_shards, partial(signal_at_file_event, 50, which))
    assert stopped.status == status, stopped.told
    assert "; `dvc repro` goes on\n" in stopped.told
    assert finished_shards(in_shards, stage)
    assert_goes_on_in_shards(in_shards, stage, fingerprint(finished_in_shards, stage))


def test_a_changed_corpus_is_tokenised_anew(in_shards: Path) -> None:
    """It is not DVC that looks at the files of a corpus."""
    run_stage_process(in_shards, "tokenise", small_shards, partial(kill_at_shard, 4))
    assert finished_shards(in_shards, "tokenise")
    with (in_shards / "corpus.txt").open("a", encoding="utf-8") as corpus:
        corpus.write("\none more document")
    ended = run_stage_process(in_shards, "tokenise", small_shards)
    assert ended.status == 0
    assert "goes on" not in ended.told
    assert ".checkpoints keeps 1 interrupted with other params, code or inputs" in ended.told


@pytest.mark.parametrize("stage", sampled(OTHERS, "evaluate_calm"))
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


@pytest.mark.parametrize("stage", sampled(DATA_STAGES, "encode_corpus"))
def test_shards_that_are_not_whole_are_never_seen(finished: Path, project: Path, stage: str) -> None:
    expected = fingerprint(finished, stage)
    largest = max((project / name).stat().st_size for name in expected)
    for size in moments(stage, "write", largest - 1, MOMENTS_OF_DATA):
        killed = run_stage_process(project, stage, partial(kill_in_file_above, size))
        assert killed.status == -signal.SIGXFSZ
        assert fingerprint(project, stage) == expected  # what stood there before, whole
    ended = run_stage_process(project, stage)
    assert ended.status == 0, ended.told
    assert fingerprint(project, stage) == expected
    assert not list((project / "data").glob(".*"))


@pytest.mark.parametrize(("which", "status"), sampled(SIGNALS, SIGNALS[1]))
@pytest.mark.parametrize("stage", sampled(TRAININGS, "train_transformer"))
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
