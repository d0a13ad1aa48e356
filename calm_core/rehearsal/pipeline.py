"""Which stages of dvc.yaml a preset calls for, in an order in which they can run."""

from collections.abc import Collection, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from calm_core.storage.yaml_io import read_yaml

PIPELINE = Path("dvc.yaml")

TRAININGS = {"autoencoder": "train_autoencoder", "calm": "train_calm", "transformer": "train_transformer"}
"""The stage that trains each model, by its section of params.yaml."""


def stages_for(models: Collection[str], pipeline: Path = PIPELINE) -> dict[str, str]:
    """The command of each stage that training ``models`` takes: for one language model those up to its training.

    An autoencoder counts with CALM, which needs one. For both language models, or none at all, it is every stage.
    """
    stages: Mapping[str, Any] = read_yaml(pipeline)["stages"]
    # Repetitions under other seeds, and models beside the run's own, take what the first run takes.
    declared = {name: stage for name, stage in stages.items() if not {"foreach", "matrix"} & stage.keys()}
    before = {name: _makers(stage.get("deps", []), declared) for name, stage in declared.items()}
    order = list(TopologicalSorter(before).static_order())
    if {"calm", "transformer"} <= set(models) or not models:
        wanted = set(declared)
    else:
        wanted = set()
        unseen = [TRAININGS[next(model for model in ("calm", "transformer", "autoencoder") if model in models)]]
        while unseen:
            stage = unseen.pop()
            wanted.add(stage)
            unseen += [maker for maker in before[stage] if maker not in wanted]
    return {name: declared[name]["cmd"] for name in order if name in wanted}


def _makers(inputs: list[str], declared: Mapping[str, Any]) -> list[str]:
    """The stages that make any of ``inputs``, whole or in part."""
    return [
        name for name, stage in declared.items() if any(_meet(path, out) for path in inputs for out in _outs(stage))
    ]


def _outs(stage: Mapping[str, Any]) -> list[str]:
    # An output with options is a mapping of its path to them.
    listed = [out for kind in ("outs", "metrics") for out in stage.get(kind, [])]
    return [next(iter(out)) if isinstance(out, dict) else out for out in listed]


def _meet(one: str, other: str) -> bool:
    return Path(one).is_relative_to(other) or Path(other).is_relative_to(one)
