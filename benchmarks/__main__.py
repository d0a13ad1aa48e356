"""`python -m benchmarks`: all of them or those named, one table, results/benchmarks.json; see docs/performance.md."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.measure import Result
from benchmarks.pages import rewrite_section
from benchmarks.results import RESULTS, as_json, record
from benchmarks.tables import described, markdown, terminal_table
from calm_core.errors import CalmError
from calm_core.runtime.machine import describe_machine
from calm_core.runtime.precision import set_threads
from calm_core.storage.json_io import read_json

PAGE, SECTION = Path("docs/performance.md"), "benchmarks"

BENCHMARKS = {
    "training_steps": "training_steps",
    "energy_loss": "energy_loss",
    "brierlm": "brierlm",
    "generation": "generation",
    "published_generation": "generation",
    "temperature": "generation",
    "tokenising": "tokenising",
    "encoding": "encoding",
    "reading_batches": "reading",
    "stage_memory": "memory",
    "short_prompts": "short_prompts",
    "busy_machine": "busy_machine",
    "starting": "starting",
}
"""Each a function of its name, and the module of ours that has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write what was measured into the page; a goal that is missed is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory against yardsticks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all of: {', '.join(BENCHMARKS)}")
    parser.add_argument(
        "--write-docs", action="store_true", help=f"measure nothing; write {RESULTS} as a table into {PAGE}"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"{', '.join(unknown)} is unknown; there are: {', '.join(BENCHMARKS)}")
    try:
        if options.write_docs:
            write_docs()
        else:
            measure(options.names or list(BENCHMARKS))
    except CalmError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def measure(names: Sequence[str]) -> None:
    """Run the benchmarks ``names`` and record each as it ends."""
    # As the stages do it. Memory that is kept helps all sides of a comparison alike.
    set_threads("auto")
    machine = describe_machine()
    print(described(machine), file=sys.stderr, flush=True)
    found: list[Result] = []
    for name in names:
        started = time.monotonic()
        results = _function(name)()
        seconds = time.monotonic() - started
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        record(name, as_json(results, seconds, machine), list(BENCHMARKS))
        found += results
    Console().print(terminal_table(found))


def write_docs(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Put the table of ``results`` into its section of ``page``.

    Raises:
        CalmError: there are no results yet.
    """
    if not results.is_file():
        raise CalmError(f"{results} is missing; `make bench` measures it")
    rewrite_section(page, SECTION, markdown(read_json(results)))


def _function(name: str) -> Callable[[], list[Result]]:
    function: Callable[[], list[Result]] = getattr(import_module(f"benchmarks.{BENCHMARKS[name]}"), name)
    return function


if __name__ == "__main__":
    sys.exit(main())
