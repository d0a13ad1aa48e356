"""The setup of a training stage: its process group, its checkpoints, and its curves through DVCLive."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvclive import Live

from calm_core.params import Params
from calm_core.runtime.machine import numerics
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import joined
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.run import Run
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import Measured
from stages.runner.verification import verify_once


@dataclass
class TrainingSession:
    """The ``run`` of a training and, once it is over, the ``seconds`` it took, before an interruption included."""

    run: Run
    seconds: float = 0.0

    def finish(self, training_tokens: int) -> Measured:
        """Mark that the outputs of the stage are written; returns its speed. For the first process alone."""
        assert self.run.checkpoints is not None
        mark_finished(self.run.checkpoints.folder)
        return {"training_tokens_per_second": training_tokens / self.seconds}


@contextmanager
def training_session(
    stage: str, params: Params, curves: Path, verify: Callable[[], None]
) -> Iterator[TrainingSession]:
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
        machine = {
            **numerics(params.runtime.precision), "processes": processes.count, "device": params.runtime.device
        }  # fmt: skip
        checkpoints = CheckpointStore(folder_of(stage, params), stage, machine)
        with _training_curves(curves) as log:
            session = TrainingSession(Run(log=log, checkpoints=checkpoints, processes=processes))
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
