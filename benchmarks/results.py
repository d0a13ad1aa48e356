"""results/benchmarks.json: what was measured, by benchmark, with the machine that each ran on.

A benchmark that runs again replaces its own results, so that single ones can be repeated.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Result
from calm_core.storage.json_io import read_json, write_json

RESULTS = Path("results/benchmarks.json")


def key_of(name: str) -> str:
    """A result's key: letters and digits of its name, in lower case, underlines between them."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def as_json(results: Sequence[Result], seconds: float, machine: dict[str, str]) -> dict[str, Any]:
    """One benchmark's entry; ``seconds`` is what it took as a whole."""
    measured = {key_of(result.name): {**result._asdict(), "met": result.met} for result in results}
    if len(measured) < len(results):
        raise ValueError(f"two results have one name: {', '.join(result.name for result in results)}")
    return {"seconds": seconds, "machine": machine, "results": measured}


def record(benchmark: str, entry: dict[str, Any], order: Sequence[str], path: Path = RESULTS) -> None:
    """Put ``entry`` into ``path``; those that ``order`` does not name are dropped."""
    entries = {**(read_json(path) if path.is_file() else {}), benchmark: entry}
    write_json(path, {name: entries[name] for name in order if name in entries})


def results_of(entry: dict[str, Any]) -> list[Result]:
    """The results of one benchmark's entry."""
    return [Result(**{field: row[field] for field in Result._fields}) for row in entry["results"].values()]
