"""The setup of a training stage: its process group, its checkpoints, and its curves through DVCLive."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from dvclive import Live
from torch import nn

from calm_core.params import Params
from calm_core.runtime.machine import numerics
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import joined
from calm_core.storage.atomic import whole_directory
from calm_core.storage.model_folder import save_model
from calm_core.training.checkpoints import Checkpoint, CheckpointStore
from calm_core.training.run import Run
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import Measured
from stages.runner.step_timer import StepTimer
from stages.runner.verification import verify_once


@dataclass
class TrainingSession:
    """The ``run`` of a training and, once it is over, the ``seconds`` it took, before an interruption included."""

    run: Run
    seconds: float = 0.0
    timer: StepTimer = field(default_factory=StepTimer)

    def keeping(self, after: frozenset[int], context_tokens: int) -> Run:
        """The run, which keeps its model, trained with ``context_tokens``, after each of the steps ``after``, too."""
        checkpoints = self.run.checkpoints  # of the first process, which alone keeps models

        def keep(step: int, model: nn.Module) -> None:
            assert checkpoints is not None
            with self.timer.stopped():
                save_model(model, None, checkpoints.kept_files / f"step-{step:07d}", context_tokens)

        return replace(self.run, keep=keep, kept_after=after)

    def write_kept(self, folder: Path) -> None:
        """Write the models that were kept, each in a folder of ``folder`` named by its step. For the first process."""
        assert self.run.checkpoints is not None
        # Copied at the end, from outside the outputs: DVC deletes those before an interrupted training resumes.
        with whole_directory(folder) as fresh:
            shutil.copytree(self.run.checkpoints.kept_files, fresh, dirs_exist_ok=True)

    def finish(self, training_tokens: int) -> Measured:
        """Mark that the outputs of the stage are written; returns its speed. For the first process alone."""
        assert self.run.checkpoints is not None
        mark_finished(self.run.checkpoints.folder)
        measured = {"training_tokens_per_second": training_tokens / self.seconds}
        if self.timer.step_seconds is not None:
            measured["step_seconds"] = self.timer.step_seconds
        device = self.run.processes.device
        if device.type == "cuda":
            measured["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        return measured


class _TimedCheckpoints(CheckpointStore):
    """Checkpoints that are no part of a step's time."""

    def __init__(self, folder: Path, name: str, machine: Mapping[str, Any], timer: StepTimer) -> None:
        super().__init__(folder, name, machine)
        self._timer = timer

    def save(self, checkpoint: Checkpoint) -> None:
        with self._timer.stopped():
            super().save(checkpoint)

    def latest(self) -> Checkpoint | None:
        found = super().latest()
        self._timer.resumes_after(found.step if found else 0)
        return found


@contextmanager
def training_session(stage: str, params: Params, curves: Path, verify: Callable[[], None]) -> Iterator[TrainingSession]:
    """Join the process group of ``stage`` while the block runs; its first process writes curves into ``curves``.

    Before the block the first process runs ``verify``, which raises CalmError if the inputs are not as they should be.
    """
    set_threads(params.runtime.threads)
    with joined(params.runtime.device) as processes:
        verify_once(processes, verify)
        if not processes.is_first:
            yield TrainingSession(Run(processes=processes))
            return
        # What the last digits depend on beside the stage's params, inputs and code: a run that resumes under other
        # settings warns of it.
        machine = {**numerics(params.runtime.precision, processes.device), "processes": processes.count}
        timer = StepTimer()
        checkpoints = _TimedCheckpoints(folder_of(stage, params), stage, machine, timer)
        with _training_curves(curves) as write:

            def log(step: int, values: Mapping[str, float]) -> None:
                timer.point(step)
                with timer.stopped():
                    write(step, values)

            session = TrainingSession(Run(log=log, checkpoints=checkpoints, processes=processes), timer=timer)
            yield session
            session.seconds = checkpoints.seconds


@contextmanager
def _training_curves(folder: Path) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A ``Run.log`` that writes a table a scalar under ``folder``/plots/metrics."""
    # dvc.yaml says what to plot and DVC tracks experiments; DVCLive writes the points and nothing else.
    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None) as live:

        def log(step: int, values: Mapping[str, float]) -> None:
            live.step = step
            for name, value in values.items():
                live.log_metric(name, value)
            # Written at each point, so that `dvc exp show` and a killed run have the latest values.
            live.make_summary()

        yield log
