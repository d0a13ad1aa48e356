"""Where the work of an interrupted stage is kept until it resumes: .checkpoints/STAGE-KEY.

The key is a hash of everything that dvc.yaml declares as the stage's dependencies, code included, so that work is
resumed under the same params alone: another param means another folder, and the old value the old folder again. The
number of processes and threads is not part of the key: any number resumes what any other saved.
"""

import hashlib
import json
import operator
import sys
from functools import reduce
from pathlib import Path
from typing import Any

from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.runtime.launcher import rank_in_environment
from calm_core.storage.checksum import sha256
from calm_core.storage.provenance import DESCRIPTION
from calm_core.storage.yaml_io import read_yaml
from stages.runner.run import CHECKPOINTS, FINISHED

PIPELINE = Path("dvc.yaml")

KEY_DIGITS = 16
"""64 bits, plenty for the few folders of a stage."""


def folder_of(stage: str, params: Params, others: Any = None) -> Path:
    """The folder for what ``stage`` depends on now: by dvc.yaml, and on ``others``, plain JSON."""
    folder = CHECKPOINTS / f"{stage}-{_key(stage, params, others)}"
    # They stay: going back to earlier params then resumes. But they take space, so they are reported.
    # By the length of a key: the name of a preset may go on where another one's ends.
    same_stage = CHECKPOINTS.glob(f"{stage}-{'?' * KEY_DIGITS}")
    foreign = [path for path in same_stage if path.is_dir() and path != folder]
    if foreign and rank_in_environment() == 0:
        size = sum(path.stat().st_size for other in foreign for path in other.rglob("*") if path.is_file())
        told = f"{len(foreign)} interrupted with other params, code or inputs, {size / 1e6:,.0f} MB"
        print(f"{stage}: {CHECKPOINTS} keeps {told}; delete what you do not want", file=sys.stderr, flush=True)
    # The stage runs, so what this folder holds is work in progress again.
    (folder / FINISHED).unlink(missing_ok=True)
    return folder


def mark_finished(folder: Path) -> None:
    """Mark that the outputs of the stage are written.

    ``folder`` stays until the next stage begins: only then is it certain that DVC has stored the outputs.
    """
    (folder / FINISHED).touch()


def _key(stage: str, params: Params, others: Any) -> str:
    name, _, item = stage.partition("@")
    declared = read_yaml(PIPELINE)["stages"][name]
    declared = declared.get("do", declared)
    # By DVC's names: of a preset and a seed it makes PRESET-SEED.
    preset, _, seed = item.rpartition("-")
    words = {"${item}": item, "${item.preset}": preset, "${item.seed}": seed}
    values = params.model_dump()
    # Of the runtime section, precision alone changes what is computed; the rest is how the machine is used.
    values["runtime"] = values["runtime"]["precision"]
    depends = {
        "params": {name: _value(values, name) for name in declared["params"]},
        "inputs": {path: _identity(Path(_filled(path, words))) for path in declared["deps"]},
        "others": others,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def _filled(path: str, words: dict[str, str]) -> str:
    """``path`` of dvc.yaml with what DVC puts in the place of each of ``words``."""
    return reduce(lambda filled, word: filled.replace(word, words[word]), words, path)


def _value(values: Any, name: str) -> Any:
    """What params.yaml holds under ``name``, a section or, as in `calm.latents`, one of its keys."""
    return reduce(operator.getitem, name.split("."), values)


def _identity(path: Path) -> Any:
    """SHA-256 of a file; of a data folder's description, which holds those of its files; of each file of code."""
    if not path.exists():
        raise CalmError(f"{path} is missing; `dvc repro` makes it")
    if not path.is_dir():
        return sha256(path)
    if (path / DESCRIPTION).is_file():
        return sha256(path / DESCRIPTION)
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(path)): sha256(file) for file in files}
