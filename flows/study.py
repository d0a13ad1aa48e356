"""The flow `study`: both models over K, widths and budgets, each point a DVC experiment, and a page of what they say.

A point is a run of `reproduce` with overrides and only the stages that it needs. What is done is in
results/study.json, under names that stand for the overrides, params.yaml, the text and the code of the stages: a
second run does what is missing, and DVC's cache what the file has lost. The page, results/study.html, is written anew
after each point. Small budgets come first.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from rich.console import Console
from rich.table import Table

from calm_core.checkout import require_checkout
from calm_core.corpus.digest import corpus_digest
from calm_core.params import load_params
from calm_core.storage.atomic import write_text
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.yaml_io import read_yaml
from calm_core.study.point import TRANSFORMER, Point, label
from flows.git import git, lines_of_zeros
from flows.pipeline import read_graph
from flows.processes import Processes
from flows.reproduce import ROOT, reproduce

RECORD, PAGE = Path("results/study.json"), Path("results/study.html")

HOURS = 3.0

SMALLEST_BUDGET = 2.5e11
"""FLOPs; a training of some seconds, from which on bits a byte tell models apart."""


def target(model: str) -> str:
    """The stage that scores ``model``, a key as ``Point.model`` has it."""
    return "evaluate_transformer" if model == TRANSFORMER else "evaluate_calm"


@flow(name="study", flow_run_name="study of {hours} hours")
def study(
    hours: float = HOURS,
    patch_sizes: list[int] = [4, 2, 8, 1],  # noqa: B006 - Prefect shows it in the UI, and nothing changes it
    widths: list[float] = [1.0, 0.5, 2.0],  # noqa: B006
    smallest_budget: float = SMALLEST_BUDGET,
    seeds: int = 1,
    dry_run: bool = False,
    folder: str | None = None,
) -> list[dict[str, Any]]:
    """Train and score both models at every point that fits into the hours; returns the points.

    Args:
        hours: Planned time of all points together, those of earlier runs included. More hours add points and remove
            none: first two decades of budgets, then widths, then larger budgets.
        patch_sizes: K of CALM, in the order in which they run.
        widths: Factors of the width in params.yaml, the first one first.
        smallest_budget: FLOPs of the smallest training; the others are 2, 4, 8 ... times as large.
        seeds: How many seeds each point is repeated under.
        dry_run: Print the plan and run nothing.
        folder: The repository; by default the one that this file lies in.
    """
    logger, root = get_run_logger(), Path(folder or ROOT).resolve()
    require_checkout(root, experiments=True)
    digest = base_digest(root)
    record = _read(root, digest)
    asked = {
        "hours": hours,
        "smallest": smallest_budget,
        "patch_sizes": patch_sizes,
        "widths": widths,
        "seeds": seeds,
        # Repetitions are points of their own here, and there is no model beside a point's.
        "further": ["evaluation.seeds=[]", "evaluation.beside=[]"],
        "rates": record.get("rates"),
    }
    planned = _plan(root, asked)
    points = merged([Point(**point) for point in planned["points"]], [Point(**point) for point in record["points"]])
    # Before the first point, too: the plan, and the speeds that a second run shall plan by.
    record |= {"machine": planned["machine"], "rates": planned["rates"]}
    Console(width=120).print(plan_table(points))
    if dry_run:
        return [point.as_json() for point in points]

    def save() -> None:
        write_json(root / RECORD, record | {"points": [point.as_json() for point in points]})
        write_page(root)

    save()
    try:
        for number, point in enumerate(points):
            if point.state == "completed":
                continue
            spent = sum(one.seconds or 0 for one in points)
            if spent >= 3600 * hours:
                logger.warning(f"{hours} hours are spent; the points that are left take more: make study HOURS=...")
                break
            logger.info(f"point {number + 1} of {len(points)}: {label(point.model)}, {point.budget:.3g} FLOPs")
            points[number] = _run(point, root, digest)
            save()
    finally:
        Processes.stop_all()
    rows = [_row(point) for point in points]
    create_table_artifact(rows, key="study", description="One row a point of the study.")
    logger.info(f"the page: {root / PAGE}; `dvc exp show` lists the experiments")
    if failed := [point_name(point, digest) for point in points if point.state == "failed"]:
        if not any(point.state == "completed" for point in points):
            raise RuntimeError("every point of the study failed")
        logger.warning(f"failed, to be tried again by the next run: {', '.join(failed)}")
    return [point.as_json() for point in points]


def _run(point: Point, root: Path, digest: str) -> Point:
    begun = time.monotonic()
    state: State[Any] = reproduce(
        point.overrides,
        targets=[target(point.model)],
        folder=str(root),
        experiment=point_name(point, digest),
        return_state=True,
    )
    seconds = time.monotonic() - begun
    if not state.is_completed():
        return replace(point, state="failed", seconds=seconds)
    metrics: Any = state.result()
    return replace(point, state="completed", seconds=seconds, scores=scores_of(point, metrics))


def scores_of(point: Point, metrics: dict[str, Any]) -> dict[str, float]:
    """``Point.scores`` out of the metrics that ``reproduce`` returns, "file: key" -> number."""
    file = "transformer" if point.model == TRANSFORMER else "calm"
    keys = {
        "brierlm": "brierlm",
        "brierlm_low": "brierlm_ci95.0",
        "brierlm_high": "brierlm_ci95.1",
        "bits_per_byte": "bits_per_byte",
        "bits_per_byte_low": "bits_per_byte_ci95.0",
        "bits_per_byte_high": "bits_per_byte_ci95.1",
    }
    found = {name: metrics[f"{file}: {key}"] for name, key in keys.items() if f"{file}: {key}" in metrics}
    bits, nats = found.get("bits_per_byte"), metrics.get(f"{file}: nats_per_token")
    if bits is not None and nats:
        # Where the interval is one of nats alone: a byte has the same share of a token at both ends.
        for name, end in (("bits_per_byte_low", 0), ("bits_per_byte_high", 1)):
            if name not in found and (value := metrics.get(f"{file}: nats_per_token_ci95.{end}")) is not None:
                found[name] = value * bits / nats
    accuracy = metrics.get("autoencoder: token_accuracy")
    # A point that is charged none has none: what is there says nothing of it.
    return found if not point.autoencoder_flops or accuracy is None else found | {"token_accuracy": accuracy}


def merged(planned: Sequence[Point], known: Sequence[Point]) -> list[Point]:
    """``planned`` with what is known of them, and what else is known to be done; small budgets first."""
    results = {tuple(point.overrides): point for point in known if point.state != "planned"}
    points = [
        replace(point, state=old.state, seconds=old.seconds, scores=old.scores)
        if (old := results.pop(tuple(point.overrides), None))
        else point
        for point in planned
    ]
    return sorted(points + [old for old in results.values() if old.state == "completed"], key=lambda one: one.budget)


def point_name(point: Point, digest: str) -> str:
    """The experiment's: the same for the same overrides and ``digest``, which stands for params.yaml, text and code."""
    own = hashlib.sha256(json.dumps([digest, point.overrides]).encode()).hexdigest()[:8]
    budget = f"{point.budget:.3g}".replace("e+", "e")
    return f"study-{point.model}-{point.hidden_size}-{budget}-{own}"


def base_digest(folder: Path) -> str:
    """Stands for what the points of ``folder`` have in common: params.yaml, the text, what git has of their code.

    Of files as they are, committed or not: points run in copies that have them so.

    Raises:
        CalmError: params.yaml has a mistake, or a file of the text that it names cannot be read.
    """
    graph = read_graph(folder)
    needed = graph.with_ancestors([target(TRANSFORMER), target("calm")]).dependencies
    stages = read_yaml(folder / "dvc.yaml")["stages"]
    # A stage that DVC makes many of has its entry under `do`, and @ and an item in the name of each.
    entries = [stages[name] for name in sorted({name.partition("@")[0] for name in needed})]
    paths = {path for entry in entries for path in entry.get("do", entry).get("deps", [])} - {"params.yaml"}
    # As the stage digest_corpus looks at it, with the same record of what was hashed before; paths are the user's.
    with contextlib.chdir(folder):
        text = corpus_digest(load_params(), Path(".checkpoints"))
    digest = hashlib.sha256(json.dumps([read_yaml(folder / "params.yaml"), entries, text], default=str).encode())
    for name in lines_of_zeros(git(folder, "ls-files", "-z", "--", *sorted(paths))) if paths else []:
        file = folder / name.decode(errors="surrogateescape")
        digest.update(name + b"\0" + (file.read_bytes() if file.is_file() else b"") + b"\0")
    return digest.hexdigest()[:16]


def plan_table(points: Sequence[Point]) -> Table:
    """What is planned and what is done: a row a budget and width, minutes a model."""
    models = list(dict.fromkeys(point.model for point in points))
    table = Table("FLOPs", "width", *(label(model) for model in models), "all", title="minutes (done: in brackets)")
    for column in table.columns:
        column.justify = "right"
    rows = dict.fromkeys((point.budget, point.hidden_size) for point in points)
    for budget, width in rows:
        of_row = [point for point in points if (point.budget, point.hidden_size) == (budget, width)]
        cells = []
        for model in models:
            of_model = [point for point in of_row if point.model == model]
            minutes = f"{_minutes(of_model):.1f}" if of_model else ""
            done = of_model and all(point.state == "completed" for point in of_model)
            cells.append(f"({minutes})" if done else minutes)
        table.add_row(f"{budget:.3g}", str(width), *cells, f"{_minutes(of_row):.1f}")
    table.add_section()
    left = [point for point in points if point.state != "completed"]
    table.add_row("", "", *(f"{_minutes([one for one in points if one.model == model]):.0f}" for model in models),
                  f"{_minutes(points):.0f}")  # fmt: skip
    table.caption = f"{len(points)} points, {len(left)} of them to run, {_minutes(left):.0f} minutes"
    return table


def write_page(root: Path) -> None:
    """Write results/study.html from results/study.json; raises CalmError if that is missing or damaged."""
    # Here: flows start without matplotlib.
    from calm_core.study.page import render_study

    record = read_json(root / RECORD)
    write_text(root / PAGE, render_study([Point(**point) for point in record["points"]], record["machine"]))


def _minutes(points: Sequence[Point]) -> float:
    return sum(point.planned_seconds if point.seconds is None else point.seconds for point in points) / 60


def _row(point: Point) -> dict[str, Any]:
    return {
        "model": label(point.model),
        "width": point.hidden_size,
        "training FLOPs": point.training_flops,
        "BrierLM": point.scores.get("brierlm"),
        "bits a byte": point.scores.get("bits_per_byte"),
        "state": point.state,
    }


def _read(root: Path, digest: str) -> dict[str, Any]:
    """What results/study.json holds, if it is of the same code, text and params; else a beginning."""
    record = read_json(root / RECORD) if (root / RECORD).exists() else {}
    return record if record.get("digest") == digest else {"digest": digest, "points": []}


def _plan(root: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The plan, made in a process of its own: counting FLOPs and measuring speed take torch, which flows do without."""
    processes, lines = Processes(), ["nothing"]
    try:
        status = processes.run([sys.executable, "-m", "calm_core.study.plan", json.dumps(asked)], root, lines.append)
    finally:
        processes.stop()
    if status:
        raise RuntimeError(f"the study cannot be planned: {lines[-1]}")
    made: dict[str, Any] = json.loads(lines[-1])
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m flows.study`: run, plan alone, or draw the page anew."""
    parser = argparse.ArgumentParser(prog="python -m flows.study", description="The study: see docs/study.md.")
    parser.add_argument("--hours", type=float, default=HOURS, help="planned time of all points together")
    parser.add_argument("--seeds", type=int, default=1, help="seeds that each point is repeated under")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--render-only", action="store_true", help="write results/study.html from results/study.json")
    given = parser.parse_args(arguments)
    if given.render_only:
        write_page(ROOT)
    else:
        study(hours=given.hours, seeds=given.seeds, dry_run=given.dry_run)


if __name__ == "__main__":
    main()
