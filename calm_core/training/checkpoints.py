"""Checkpoints of a training: a killed process loses no more than the steps since the last one.

They lie outside the stage's outputs, which DVC deletes before a stage runs, in a folder keyed by params, inputs and
code (stages/runner/resume.py). A checkpoint is one safetensors file whose name ends in the SHA-256 of its content: a
single atomic rename publishes both, and damage is found when it is read. The last two are kept.
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
"""Shortest time between two checkpoints."""

_NAME = re.compile(r"step-(?P<step>\d{8,})-(?P<sha256>[0-9a-f]{64})\.safetensors")

Points = list[tuple[int, dict[str, float]]]
"""Points of a training curve: the number of steps done, and the values logged then."""


class Checkpoint(NamedTuple):
    """All that a training needs to resume as if it had never stopped."""

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
        # Monotonic: a clock that is set while a training runs changes neither its duration nor when checkpoints are
        # due.
        self._started = self._saved_at = time.monotonic()
        self._cost = 0.0
        self._earlier_seconds = 0.0
        self.kept_files.mkdir(parents=True, exist_ok=True)

    @property
    def kept_files(self) -> Path:
        """A folder for files, such as intermediate models, that the training makes on its way.

        A checkpoint records the hashes of the files here when it was saved, and is valid only while all of them are
        there, unchanged. Whoever writes here writes atomically.
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
        """Write ``checkpoint`` atomically, then remove all but the last ``KEPT``.

        Raises:
            OSError or SafetensorError: it cannot be written; earlier checkpoints are as they were.
        """
        started = time.monotonic()
        for name, path in self._kept().items():
            # Kept files do not change, so each is hashed once and not at every checkpoint.
            if name not in self._hashes:
                self._hashes[name] = sha256(path)
        record = {
            "curve": checkpoint.curve,
            "kept_files": self._hashes,
            "seconds": self.seconds,
            "machine": self._machine,
        }
        # The final name holds the content's hash, so it is known only after the file is written.
        with scratch_folder(self.folder) as scratch:
            fresh = scratch / "checkpoint.safetensors"
            save_tensors(checkpoint.tensors, fresh, {"record": json.dumps(record)})
            move_into_place(fresh, self.folder / f"step-{checkpoint.step:08d}-{sha256(fresh)}.safetensors")
        # Only now that the new one is in place: at no time are there fewer intact ones than before.
        for path in self._newest_first()[KEPT:]:
            path.unlink()
        self._saved_at = time.monotonic()
        # Writing to a slow disk makes checkpoints rarer, so that they keep to their share of the time.
        self._cost = self._saved_at - started

    def latest(self) -> Checkpoint | None:
        """The last intact checkpoint, None if there is none; damaged ones are reported and removed.

        Kept files that it does not record, of later steps or of an interrupted write, are removed.
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
        """The checkpoint in ``path``; None if its hash, or that of a kept file that it records, is another one."""
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if sha256(path) != match["sha256"]:
            return None
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            # Copies: the file is memory-mapped, and it will be removed when later checkpoints are saved.
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
