"""A rehearsal: all stages that a run needs, for real and at full shape, in a folder of their own.

Nothing of the user's data, models or results is touched. What a plan only estimates is seen here: whether memory is
enough, whether a stage fails at that shape, and how long a step takes.
"""

import os
import shutil
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import Timeout
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from calm_core.corpus.botocore_docs import botocore_documents
from calm_core.costs.matching import with_matched_steps
from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.rehearsal.pipeline import PIPELINE, TRAININGS, stages_for
from calm_core.rehearsal.shrink import FEWEST_STEPS, Shrunk, characters_of_sliver, shrink
from calm_core.rehearsal.stage_process import run_stage
from calm_core.rehearsal.stand_in import stand_in_tokenizer
from calm_core.storage.json_io import read_json
from calm_core.storage.lock import acquire
from calm_core.storage.yaml_io import yaml_text
from calm_core.training.initial import named_folder

WORKSPACE = Path(".checkpoints/rehearsal")
"""On the disk of the models; ignored by git and DVC, and removed at the end."""

CODE = ("calm_core", "stages")


class Rehearsed(BaseModel):
    """What a stage took; the figures of steps are those of trainings."""

    model_config = ConfigDict(frozen=True)

    stage: str
    seconds: float
    peak_bytes: int
    device_peak_bytes: int | None = None
    """Of a GPU's memory."""
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    full_run_hours: float | None = None
    """The training of the whole run at that speed, on this machine."""


class Rehearsal(BaseModel):
    """All stages in their order, and what was shrunk."""

    model_config = ConfigDict(frozen=True)

    stages: list[Rehearsed]
    shrunk: list[str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def full_run_hours(self) -> float:
        """Of all trainings together."""
        return sum(stage.full_run_hours or 0.0 for stage in self.stages)


def rehearse(params: Params, models: Collection[str], steps: int = FEWEST_STEPS) -> Rehearsal:
    """Run the stages that training ``models`` takes (``stages_for``) at the shapes of ``params``, for ``steps`` steps.

    Raises:
        CalmError: a stage fails; another rehearsal is running here; the current folder is not the repository's root.
    """
    if not PIPELINE.is_file():
        raise CalmError(f"{PIPELINE} is missing; run from the repository's root")
    commands = stages_for(models)
    params = with_matched_steps(params)
    with _ended_by_sigterm(), _workspace() as folder:
        shrunk = _prepare(params, steps, folder)
        # The workspace's links come first in any case; this is for stages that start Python themselves.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), _inherited_path()]))}
        rehearsed = []
        for number, (name, command) in enumerate(commands.items(), 1):
            print(f"{name} ({number} of {len(commands)})", file=sys.stderr, flush=True)
            finished = run_stage(name, command, folder, environment)
            figures = _figures(name, params, shrunk.params, folder)
            rehearsed.append(Rehearsed(stage=name, seconds=finished.seconds, peak_bytes=finished.peak_bytes, **figures))
    # Each note begins with the section that it is about; some are of sections that nothing here used.
    unused = {f"{model}:" for model, training in TRAININGS.items() if training not in commands}
    unused |= set() if "report" in commands else {"evaluation:"}
    return Rehearsal(stages=rehearsed, shrunk=[note for note in shrunk.notes if note.split()[0] not in unused])


def render_rehearsal(rehearsal: Rehearsal) -> RenderableType:
    """``rehearsal`` as a table to read, and under it what was shrunk."""
    columns = ("seconds", "memory", "s a step", "tokens/s", "full run")
    on_device = any(row.device_peak_bytes for row in rehearsal.stages)
    table = Table(Column("stage", no_wrap=True))
    for column in (*columns, *(["GPU"] if on_device else [])):
        table.add_column(column, justify="right")
    for row in rehearsal.stages:
        cells = [row.stage, f"{row.seconds:.1f}", f"{row.peak_bytes / 1e9:.2f} GB"]
        cells += ["" if row.step_seconds is None else f"{row.step_seconds:.3g}"]
        cells += ["" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"]
        cells += ["" if row.full_run_hours is None else _duration(row.full_run_hours)]
        cells += [f"{row.device_peak_bytes / 1e9:.2f} GB" if row.device_peak_bytes else ""] if on_device else []
        table.add_row(*cells)
    notes = (
        *(f"Shrunk: {note}." for note in rehearsal.shrunk),
        "Memory: the largest that the stage's process had.",
        f"The full run: {_duration(rehearsal.full_run_hours)} of training on this machine, at this speed.",
    )
    return Group(table, *map(Text, notes))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the block, so that it leaves neither a stage nor gigabytes behind; Ctrl-C does by itself."""

    def end(number: int, frame: Any) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder in which stages find the code and dvc.yaml; removed at the end, as is that of a killed rehearsal."""
    WORKSPACE.parent.mkdir(exist_ok=True)
    try:
        held = acquire(WORKSPACE.with_suffix(".lock"))
    except Timeout:
        raise CalmError(f"another rehearsal is running here, in {WORKSPACE}; wait for it or stop it") from None
    with held:
        shutil.rmtree(WORKSPACE, ignore_errors=True)
        WORKSPACE.mkdir()
        try:
            for name in (*CODE, str(PIPELINE)):
                (WORKSPACE / name).symlink_to(Path(name).resolve())
            yield WORKSPACE
        finally:
            shutil.rmtree(WORKSPACE, ignore_errors=True)


def _prepare(params: Params, steps: int, folder: Path) -> Shrunk:
    """Write params.yaml, and the stand-in tokenizer if there is no other, into ``folder``."""
    texts = _sliver(characters_of_sliver(params))
    size, given = params.tokenizer.vocabulary_size, Path(params.tokenizer.path).expanduser()
    if params.tokenizer.path and given.exists():
        tokenizer, note = str(given.resolve()), None
    else:
        tokenizer = "stand-in.json"
        stand_in_tokenizer(texts, size).save(str(folder / tokenizer))
        missing = f", since {given} is missing" if params.tokenizer.path else ""
        note = (
            f"tokenizer: a stand-in of {size:,} entries, trained on that text and filled up with unused ones{missing}"
        )
    shrunk = shrink(_with_models_from_here(params), steps, len(texts), tokenizer)
    (folder / "params.yaml").write_text(yaml_text(shrunk.params.model_dump()), encoding="utf-8")
    return shrunk._replace(notes=[*shrunk.notes, *([note] if note else [])])


def _with_models_from_here(params: Params) -> Params:
    """``params`` whose models to go on from are named by absolute paths: the rehearsal's folder is another one."""
    named = {name: getattr(params, name) for name in ("calm", "transformer")}
    absolute = {
        name: section.model_copy(update={"initial": str(named_folder(section.initial).absolute())})
        for name, section in named.items()
        if section.initial
    }
    return params.model_copy(update=absolute)


def _sliver(characters: int) -> list[str]:
    """The first documents of the default corpus that together have so many ``characters``, or all."""
    texts: list[str] = []
    for document in botocore_documents():
        texts.append(document["text"])
        characters -= len(texts[-1])
        if characters <= 0:
            break
    return texts


def _figures(stage: str, full: Params, rehearsed: Params, folder: Path) -> dict[str, Any]:
    """The speed of the training that ``stage`` is, from what it recorded about itself; nothing of another stage."""
    section = next((name for name, training in TRAININGS.items() if training == stage), None)
    if section is None:
        return {}
    timing = read_json(folder / "results/timings.json")[stage]
    if "step_seconds" not in timing:  # an autoencoder that came with calm.initial
        return {}
    small, whole = getattr(rehearsed, section), getattr(full, section)
    rate = small.training_tokens / small.steps / timing["step_seconds"]
    return {
        "step_seconds": timing["step_seconds"],
        "device_peak_bytes": timing.get("device_peak_bytes"),
        "tokens_per_second": rate,
        "full_run_hours": whole.training_tokens / rate / 3600,
    }


def _inherited_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    days = hours / 24
    return f"{hours:.1f} h" if days < 2 else f"{days:,.1f} days" if days < 1000 else f"{days / 365.25:,.0f} years"
