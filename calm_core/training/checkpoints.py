"""Checkpoints of a training that is under way: a process that is killed loses the steps since the last one, no more.

They lie outside the artefacts, since DVC deletes a stage's outputs before it runs, in a folder that belongs to one
training alone: same params, same inputs, same code (stages/interrupted.py names it). A checkpoint is one
safetensors file whose name ends in the SHA-256 of its content, so that a single rename publishes both and
any damage shows when it is read. The last two are kept.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from calm_core.storage.atomic import move_into_place, scratch_folder
from calm_core.storage.checksum import sha256
from calm_core.storage.tensors import save_tensors

KEPT = 2
"""How many checkpoints stay: the last, and the one before in case the last is damaged."""

SHARE = 0.01
"""The share of a training's time that writing checkpoints may take."""

SHORTEST_SECONDS = 10.0
"""How far apart checkpoints are at least; twice as much work is never lost as long as they cost little."""

_NAME = re.compile(r"step-(?P<step>\d{8,})-(?P<sha256>[0-9a-f]{64})\.safetensors")

Points = list[tuple[int, dict[str, float]]]
"""Points of a training curve: the number of steps done, and the values logged then."""


class Checkpoint(NamedTuple):
    """All that a training needs to go on as if it had never stopped."""

    step: int
    """How many steps are done."""
    tensors: dict[str, Tensor]
    """Weights, state of the optimisers, and sums since the last point of the curve; contiguous, on the CPU."""
    curve: Points


class CheckpointStore:
    """The checkpoints of one training, in ``folder``; ``name`` is how the lines that it prints begin.

    ``machine`` describes what numbers depend on beside params, inputs and code, such as the number of threads.
    """

    def __init__(self, folder: Path, name: str, machine: Mapping[str, Any] | None = None) -> None:
        self.folder, self._name = folder, name
        self._machine = dict(machine or {})
        self._hashes: dict[str, str] = {}
        self._started = self._saved_at = time.monotonic()
        self._cost = 0.0
        self._earlier_seconds = 0.0
        self.kept_files.mkdir(parents=True, exist_ok=True)

    @property
    def kept_files(self) -> Path:
        """A folder for what the training makes on its way and hands over at its end.

        A checkpoint remembers what lay here when it was saved and is not used unless all of that is still there,
        unchanged. Files are written whole or not at all.
        """
        return self.folder / "kept"

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training, that of earlier processes included up to where they saved."""
        return self._earlier_seconds + time.monotonic() - self._started

    def due(self) -> bool:
        """Whether it is time for a checkpoint: writing them takes at most ``SHARE`` of all time."""
        return time.monotonic() - self._saved_at >= max(SHORTEST_SECONDS, self._cost / SHARE)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint``, whole or not at all, then remove all but the last ``KEPT``.

        Raises:
            OSError or SafetensorError: it cannot be written; earlier checkpoints are as they were.
        """
        started = time.monotonic()
        for name, path in self._kept().items():
            if name not in self._hashes:
                self._hashes[name] = sha256(path)
        record = {
            "curve": checkpoint.curve,
            "kept_files": self._hashes,
            "seconds": self.seconds,
            "machine": self._machine,
        }
        with scratch_folder(self.folder) as scratch:
            fresh = scratch / "checkpoint.safetensors"
            save_tensors(checkpoint.tensors, fresh, {"record": json.dumps(record)})
            move_into_place(fresh, self.folder / f"step-{checkpoint.step:08d}-{sha256(fresh)}.safetensors")
        for path in self._newest_first()[KEPT:]:
            path.unlink()
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is whole, None if there is none; damaged ones are told of and removed.

        Kept files that are of later steps, or were not whole when the process was killed, are removed.
        """
        found = None
        paths = self._newest_first()
        for position, path in enumerate(paths):
            found = self._read(path)
            if found is not None:
                break
            instead = "the one before it is used" if position + 1 < len(paths) else "there is no other: it starts anew"
            self._tell(f"checkpoint {path} is damaged; {instead}")
            path.unlink()
        for name, path in self._kept().items():
            if name not in self._hashes:
                path.unlink()
        return found

    def _kept(self) -> dict[str, Path]:
        paths = (path for path in self.kept_files.rglob("*") if path.is_file())
        return {str(path.relative_to(self.kept_files)): path for path in paths}

    def _tell(self, line: str) -> None:
        print(f"{self._name}: {line}", file=sys.stderr, flush=True)

    def _newest_first(self) -> list[Path]:
        found = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, key=lambda pair: int(pair[0]["step"]), reverse=True)]

    def _read(self, path: Path) -> Checkpoint | None:
        """What ``path`` holds; None if it, or a kept file that it counts on, is not what was written."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if sha256(path) != match["sha256"]:
            return None
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            # Copies, since a mapped file cannot be removed everywhere, nor written over anywhere.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        for name, expected in record["kept_files"].items():
            with contextlib.suppress(FileNotFoundError):
                if sha256(self.kept_files / name) == expected:
                    continue
            return None
        self._hashes = record["kept_files"]
        self._earlier_seconds, self._started = record["seconds"], time.monotonic()
        changed = [
            f"{key} was {record['machine'].get(key)} and is {value}"
            for key, value in self._machine.items()
            if record["machine"].get(key) != value
        ]
        if changed:
            self._tell(f"{'; '.join(changed)}: the last digits will differ from those of an unbroken run")
        return Checkpoint(int(match["step"]), tensors, [(step, values) for step, values in record["curve"]])
