"""Results as a table: on the terminal, and in Markdown for docs/performance.md."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.measure import Result
from benchmarks.results import results_of

_COLUMNS = ("what", "against", "measured", "goal", "met")


def terminal_table(results: Sequence[Result]) -> Table:
    """For rich; a goal that is missed stands out."""
    table = Table(*_COLUMNS, title=f"{_met(results)} goals met")
    for result in results:
        table.add_row(*_row(result), style=None if result.met else "bold red")
    return table


def markdown(entries: dict[str, Any]) -> str:
    """The results of every benchmark, what is missed in bold, and where they were measured."""
    results = [result for entry in entries.values() for result in results_of(entry)]
    lines = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    for result in results:
        *row, met = _row(result)
        lines.append(_line([*row, met if result.met else f"**{met}**"]))
    machines: dict[str, list[str]] = {}
    for benchmark, entry in entries.items():
        machines.setdefault(described(entry["machine"]), []).append(benchmark)
    lines += ["", f"{_met(results)} goals met."]
    for machine, benchmarks in machines.items():
        which = "" if len(machines) == 1 else f" ({', '.join(benchmarks)})"
        minutes = sum(entries[benchmark]["seconds"] for benchmark in benchmarks) / 60
        lines.append(f"Measured in {minutes:.0f} minutes{which} on {machine}.")
    return "\n".join(lines)


def described(machine: dict[str, str]) -> str:
    """The machine in a line; keys as in ``calm_core.runtime.machine``."""
    torch = next(name for name in machine["packages"].split(", ") if name.startswith("torch "))
    facts = [f"{machine['threads']} threads of {machine['processor']}", f"bfloat16 {machine['bfloat16']}"]
    return ", ".join([*facts, machine["system"], torch, f"revision {machine['git revision']}"])


def number(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(result: Result) -> list[str]:
    goal = f"{result.comparison} {number(result.goal)}"
    return [result.name, result.yardstick, f"{number(result.value)} {result.unit}", goal, "yes" if result.met else "no"]


def _met(results: Sequence[Result]) -> str:
    return f"{sum(result.met for result in results)} of {len(results)}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
