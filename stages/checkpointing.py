"""Where an interrupted training is kept until it goes on: .checkpoints/STAGE-KEY.

The key is made of all that dvc.yaml says the stage depends on, its code included, so that a training never goes on
from the checkpoints of another: change a param and there are others, change it back and the first ones are used. How
many processes and threads work on it is left out: any number of them goes on from what any other saved.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import yaml

from calm_core.artefacts import sha256
from calm_core.checkpoints import CheckpointStore
from calm_core.machine import processor
from calm_core.params import Params
from calm_core.precision import uses_bfloat16
from calm_core.token_files import DESCRIPTION
from stages.running import CHECKPOINTS, FINISHED

PIPELINE = Path("dvc.yaml")


def checkpoints_of(stage: str, params: Params, processes: int = 1) -> CheckpointStore:
    """The checkpoints of ``stage`` for what it depends on now; ``processes`` work on it."""
    folder = CHECKPOINTS / f"{stage}-{_key(stage, params)}"
    others = [path for path in CHECKPOINTS.glob(f"{stage}-*") if path.is_dir() and path != folder]
    if others:
        size = sum(path.stat().st_size for other in others for path in other.rglob("*") if path.is_file())
        told = f"{len(others)} interrupted with other params, code or inputs, {size / 1e6:,.0f} MB"
        print(f"{stage}: {CHECKPOINTS} keeps {told}; delete what you do not want", file=sys.stderr, flush=True)
    machine = {
        "threads": torch.get_num_threads(),
        "bfloat16": uses_bfloat16(params.runtime.precision, torch.device("cpu")),
        "processor": processor(),
        "torch": torch.__version__,
        "processes": processes,
        "device": params.runtime.device,
    }
    store = CheckpointStore(folder, stage, machine)
    (folder / FINISHED).unlink(missing_ok=True)
    return store


def _key(stage: str, params: Params) -> str:
    declared = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"][stage]
    values = params.model_dump()
    values["runtime"] = values["runtime"]["precision"]
    depends = {
        "params": {section: values[section] for section in declared["params"]},
        "inputs": {path: _identity(Path(path)) for path in declared["deps"]},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _identity(path: Path) -> str:
    """SHA-256 of a file; of a folder's description, which holds those of its files."""
    return sha256(path / DESCRIPTION if path.is_dir() else path)


def finished(store: CheckpointStore) -> None:
    """Say that the outputs of the stage are written.

    The checkpoints stay until the next stage begins: before that nobody knows whether DVC could keep the outputs.
    """
    (store.folder / FINISHED).touch()
