"""The checkpoints of a training stage, in the folder that ``interrupted`` names."""

from calm_core.params import Params
from calm_core.runtime.machine import numerics
from calm_core.training.checkpoints import CheckpointStore
from stages.runner.resume import folder_of, mark_finished


def checkpoints_of(stage: str, params: Params, processes: int = 1) -> CheckpointStore:
    """The checkpoints of ``stage`` for what it depends on now; ``processes`` work on it."""
    runtime = params.runtime
    machine = {**numerics(runtime.precision), "processes": processes, "device": runtime.device}
    return CheckpointStore(folder_of(stage, params), stage, machine)


def finished(store: CheckpointStore) -> None:
    """Say that the outputs of the stage are written."""
    mark_finished(store.folder)
