"""The pipeline through DVC: its stages, which of them are out of date, and running one stage.

A stage runs by `dvc repro --single-item`, which checks that stage alone: a whole `dvc repro` blocks on an unchanged
dependency that two running stages share (treeverse/dvc #11054). `--wait-for-lock` waits for DVC's own lock (#10465).
"""

import json
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.processes import Processes

LAST_LINES = 20
"""Lines of a failed stage's output that its state shows."""

TRANSIENT = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|timed out|Connection (?:refused|reset|aborted)|"
    r"Temporary failure in name resolution|Name or service not known|\b(?:429|50[0234])\b.{0,40}(?:Error|for url)",
)
"""Signs of a transient failure in a stage's output: a network that is unavailable or busy."""

Outcome = Literal["ran", "ran, with the same outputs", "up to date", "restored"]

UNCHANGED: Outcome = "ran, with the same outputs"


class StageError(Exception):
    """A stage ended with a status other than 0; ``transient`` if another try may do better."""

    def __init__(self, stage: str, status: int, lines: list[str]) -> None:
        self.transient = any(TRANSIENT.search(line) for line in lines)
        super().__init__(f"stage {stage} ended with exit status {status}; its last lines:\n" + "\n".join(lines))


class Graph(NamedTuple):
    """Each stage's name -> the names of the stages whose outputs it reads, in an order that respects them."""

    dependencies: dict[str, set[str]]

    def with_ancestors(self, targets: list[str]) -> "Graph":
        """The part of the graph that ``targets`` need; raises ValueError for a name that is no stage."""
        if unknown := sorted(set(targets) - self.dependencies.keys()):
            raise ValueError(f"{', '.join(unknown)} is no stage; there are: {', '.join(self.dependencies)}")
        needed: set[str] = set()
        open_names = list(targets)
        while open_names:
            name = open_names.pop()
            if name not in needed:
                needed.add(name)
                open_names.extend(self.dependencies[name])
        return Graph({name: found for name, found in self.dependencies.items() if name in needed})


def read_graph(folder: Path) -> Graph:
    """The stages of ``folder``/dvc.yaml from DVC's own graph."""
    import networkx
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        graph = repo.index.graph
        # DVC's edges lead from a stage to what it needs; reversed, dependencies come first.
        order = list(networkx.topological_sort(graph.reverse(copy=True)))
        # By name, not by DVC's own address, which is relative to wherever this process stands.
        return Graph({stage.name: {before.name for before in graph.successors(stage)} for stage in order})


def changed_stages(folder: Path, processes: Processes) -> set[str]:
    """Names of the stages that DVC does not find up to date; what follows a changed stage may be missing."""
    lines: list[str] = []
    status = processes.run(["dvc", "--wait-for-lock", "status", "--json"], folder, lines.append)
    try:
        # The last line: DVC may print warnings before it.
        return set(json.loads(lines[-1]))
    except (ValueError, IndexError):
        raise StageError("dvc status", status, lines[-LAST_LINES:]) from None


def run_stage(folder: Path, stage: str, force: bool, processes: Processes, on_line: Callable[[str], None]) -> Outcome:
    """Bring one stage up to date; ``on_line`` receives its output.

    Raises:
        StageError: it ended with a status other than 0.
    """
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), stage]
    last: deque[str] = deque(maxlen=LAST_LINES)
    outcome: Outcome = "up to date"
    before = _lock(folder)

    def read(line: str) -> None:
        nonlocal outcome
        # DVC reports what it did in words alone; its exit status is 0 for all three outcomes.
        if line.startswith("Running stage"):
            outcome = "ran"
        elif line.startswith("Stage") and "skipping run, checking out outputs" in line:
            outcome = "restored"
        if line:
            last.append(line)
        on_line(line)

    if status := processes.run(command, folder, read):
        raise StageError(stage, status, list(last))
    # A stage that runs always, and finds nothing new, makes nothing stale.
    return UNCHANGED if outcome == "ran" and before and _lock(folder) == before else outcome


def _lock(folder: Path) -> bytes:
    """What DVC has recorded of all stages; nothing if none has run."""
    try:
        return (folder / "dvc.lock").read_bytes()
    except FileNotFoundError:
        return b""


def read_metrics(folder: Path) -> dict[str, Any]:
    """Every number in the metric files of dvc.yaml, "file: key.key" -> value; missing files are left out."""
    from calm_core.storage.yaml_io import read_yaml

    stages = read_yaml(folder / "dvc.yaml")["stages"]
    numbers: dict[str, Any] = {}
    for stage in stages.values():
        for metric in stage.get("metrics", []):
            path = folder / (metric if isinstance(metric, str) else next(iter(metric)))
            try:
                numbers |= _numbers(json.loads(path.read_text(encoding="utf-8")), f"{path.stem}: ")
            except (FileNotFoundError, ValueError):
                continue
    return numbers


def _numbers(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = {str(index): item for index, item in enumerate(value)}.items()
    else:
        return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
    separator = "" if name.endswith(": ") else "."
    return {key: number for part, item in entries for key, number in _numbers(item, f"{name}{separator}{part}").items()}
