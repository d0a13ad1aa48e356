"""What is around each training stage: its processes, its checkpoints and its curves."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from calm_core.params import Params
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import Processes, joined
from calm_core.training.checkpoints import CheckpointStore
from stages.runner.checkpointing import checkpoints_of
from stages.runner.curves import training_curves


class TrainingRun(NamedTuple):
    """What ``calm_core.training.loop.train`` is given of it; all but the first process have no checkpoints."""

    log: Callable[[int, Mapping[str, float]], None]
    checkpoints: CheckpointStore | None
    processes: Processes


@contextmanager
def training_run(stage: str, params: Params, curves: Path) -> Iterator[TrainingRun]:
    """Connect the processes of ``stage`` while the block runs; the first one writes its curves into ``curves``."""
    set_threads(params.runtime.threads)
    with joined(params.runtime.device) as processes:
        if processes.is_first:
            checkpoints = checkpoints_of(stage, params, processes.count)
            with training_curves(curves) as log:
                yield TrainingRun(log, checkpoints, processes)
        else:
            yield TrainingRun(lambda done, values: None, None, processes)
