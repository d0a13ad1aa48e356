"""The artifacts of a run in the Prefect UI: metrics with their change, the report's plots, params, progress."""

import base64
import re
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

PROGRESS = re.compile(r"^(?P<name>[\w ]+): (?P<done>[\d,]+)/(?P<total>[\d,]+) (?P<unit>\w+), ")
"""A line of progress as the stages print it where there is no terminal."""


def publish_metrics(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A table of every metric, with its value before this run and the change."""
    rows = []
    for name in sorted(after):
        old, new = before.get(name), after[name]
        change = "" if old is None else _short(new - old) if new != old else "="
        rows.append(
            {"metric": name, "value": _short(new), "before": "" if old is None else _short(old), "change": change}
        )
    create_table_artifact(rows, key="metrics", description="Metrics of this run, and the change since the last one.")


def publish_params(params: Path, overrides: list[str], revision: str) -> None:
    """The params that the run used, the overrides named first."""
    given = _code("\n".join(overrides)) if overrides else "none\n"
    text = _code(params.read_text(encoding="utf-8"), "yaml")
    create_markdown_artifact(
        f"Git revision `{revision}`. Overrides:\n\n{given}\nparams.yaml:\n\n{text}",
        key="params",
        description="What this run was asked for.",
    )


def publish_report(report: Path) -> None:
    """The plots of results/report.html as pictures, and where the whole page lies."""
    if report.is_file():
        svgs = re.findall(r"<svg.*?</svg>", report.read_text(encoding="utf-8"), re.DOTALL)
        pictures = "\n\n".join(_picture(svg) for svg in svgs)
        create_markdown_artifact(
            f"{pictures}\n\nThe whole report: `{report.resolve()}`", key="plots", description="Plots of the report."
        )


def publish_picture(svg: str, key: str, description: str) -> None:
    """One plot as a picture."""
    create_markdown_artifact(_picture(svg), key=key, description=description)


class StageProgress:
    """A progress artifact that follows the lines of one stage; there is none until the first line of progress."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None
        self._name = ""

    def read(self, line: str) -> None:
        """Look for progress in ``line``."""
        found = PROGRESS.match(line)
        if not found:
            return
        done, total = (int(found[group].replace(",", "")) for group in ("done", "total"))
        percent = 100.0 * done / total if total else 100.0
        # A stage may do several things, one after the other; each has progress of its own.
        if self._artifact is None or found["name"] != self._name:
            self._name = found["name"]
            # Prefect allows lower-case letters, digits and dashes in a key.
            key = re.sub(r"[^a-z0-9]+", "-", f"progress-{self._stage}-{self._name}".lower()).strip("-")
            created = create_progress_artifact(percent, key=key, description=f"{self._stage}: {self._name}")
            self._artifact = created if isinstance(created, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent)


def _code(text: str, language: str = "") -> str:
    """``text`` as a block of code that nothing in it can end, so that no HTML in it is taken for such."""
    # Longer than any run of backticks in the text.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}\n"


def _picture(svg: str) -> str:
    """Markdown that holds ``svg`` itself: the server keeps no files."""
    # Inside HTML an SVG needs no namespace; as a picture of its own it does.
    if "xmlns=" not in svg.split(">", 1)[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"![plot](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
