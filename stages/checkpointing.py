"""The checkpoints of a training stage, in the folder that ``interrupted`` names."""

from calm_core.checkpoints import CheckpointStore
from calm_core.machine import numerics
from calm_core.params import Params
from stages.interrupted import folder_of, mark_finished


def checkpoints_of(stage: str, params: Params) -> CheckpointStore:
    """The checkpoints of ``stage`` for what it depends on now."""
    return CheckpointStore(folder_of(stage, params), stage, numerics(params.runtime.precision))


def finished(store: CheckpointStore) -> None:
    """Say that the outputs of the stage are written."""
    mark_finished(store.folder)
