"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINES = 10
"""How many plain lines a piece of work of known length prints."""
_SECONDS = 15
"""How far apart the plain lines of work of unknown length are."""


class Advance(Protocol):
    """Reports that ``done`` more units are finished; ``note`` is shown beside."""

    def __call__(self, done: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(name: str, total: int | None, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of ``name`` over ``total`` units (None if unknown) on standard error while the block runs.

    ``done`` units were finished before.
    """
    console = Console(stderr=True)
    # On standard error, so that a command's output can be piped; a bar in a log file would be thousands of lines.
    if console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(name, total=total, completed=done, note="")
            yield lambda done=1, note="": bar.update(task, advance=done, **({"note": note} if note else {}))
    else:
        yield _lines(name, total, unit, done)


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{_short(task.speed)} {self._unit}/s" if task.speed else "", style="cyan")


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )


def _lines(name: str, total: int | None, unit: str, earlier: int) -> Advance:
    started = last = time.monotonic()
    done_units = earlier

    def advance(done: int = 1, note: str = "") -> None:
        nonlocal done_units, last
        before, done_units = done_units, done_units + done
        now = time.monotonic()
        if total is None:
            due = now - last >= _SECONDS
        else:
            # A line each time another tenth is complete, however large a step of ``done`` is.
            due = before * _LINES // total != done_units * _LINES // total
        if not due:
            return
        last = now
        # Without the units of an earlier process, whose time is not known here.
        rate = (done_units - earlier) / max(now - started, 1e-9)
        line = f"{name}: {done_units:,}" + ("" if total is None else f"/{total:,}") + f" {unit}, {_short(rate)}/s"
        if total is not None:
            line += f", {(total - done_units) / rate:.0f} s left"
        print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance


def _short(rate: float) -> str:
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if rate >= limit:
            return f"{rate / limit:.1f}{suffix}"
    return f"{rate:.1f}"
