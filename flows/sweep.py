"""The flow `sweep`: the pipeline at several settings, each a DVC experiment of its own; the tree stays as it is.

Every point is a run of `reproduce` with overrides, in a copy with the same cache, so that points share whatever
stages they have in common. One that fails does not stop the others. A table and a plot compare them at the end.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import product
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.artifacts import publish_picture
from flows.processes import Processes
from flows.reproduce import ROOT, reproduce

COLUMNS = {
    "calm BrierLM": "brierlm: calm.brierlm",
    "calm training FLOPs": "flops: run.calm.training_flops_with_autoencoder",
    "transformer BrierLM": "brierlm: transformer.brierlm",
    "transformer training FLOPs": "flops: run.transformer.training_flops",
    "token accuracy": "autoencoder: token_accuracy",
}
"""Columns of the comparison, and the metrics that they show."""


def combinations(grid: dict[str, list[Any]], points: list[list[str]]) -> list[list[str]]:
    """The points of a sweep as lists of overrides: every combination of ``grid``, then ``points``.

    Raises:
        ValueError: there is none.
    """
    crossed = [[f"{key}={_literal(value)}" for key, value in zip(grid, values, strict=True)]
               for values in product(*grid.values())] if grid else []  # fmt: skip
    if not (found := crossed + points):
        raise ValueError("a sweep needs a grid, as {'calm.head': ['energy', 'flow']}, or a list of points")
    return found


def _literal(value: Any) -> str:
    """``value`` as an override has it: text in quotes, but for the numbers that Prefect takes for text.

    Prefect reads prefect.yaml by YAML 1.1, to which 1e-5 is text.
    """
    number = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+e[-+]?[0-9]+", value, re.IGNORECASE)
    return value if number else json.dumps(value)


@flow(name="sweep", flow_run_name=lambda: f"sweep of {len(combinations(*_asked()))}")
def sweep(
    grid: dict[str, list[Any]] = {},  # noqa: B006 - Prefect shows it in the UI, and nothing changes it
    points: list[list[str]] = [],  # noqa: B006
    always: list[str] = [],  # noqa: B006
    experiments_at_once: int = 1,
    stages_at_once: int = 2,
    folder: str | None = None,
) -> list[dict[str, Any]]:
    """Run the pipeline at several settings and compare them; returns a row for each.

    Args:
        grid: For each key of params.yaml the values to try; all combinations are run.
        points: Further settings, each a list of overrides as for `dvc exp run -S`.
        always: Overrides that every point has.
        experiments_at_once: How many points may run at the same time.
        stages_at_once: How many stages of a point may run at the same time.
        folder: The repository; by default the one that this file lies in.
    """
    logger, root = get_run_logger(), Path(folder or ROOT).resolve()
    name = f"sweep-{str(runtime.flow_run.id)[:8]}"
    asked = combinations(grid, points)

    def run(number: int) -> dict[str, Any]:
        overrides, experiment = [*always, *asked[number]], f"{name}-{number}"
        state: State[Any] = reproduce(
            overrides,
            at_once=stages_at_once,
            folder=str(root),
            experiment=experiment,
            return_state=True,
        )
        row: dict[str, Any] = {"experiment": experiment, "overrides": " ".join(asked[number]), "state": state.name}
        # A failed point has a row without numbers; the others go on.
        metrics: Any = state.result(raise_on_failure=False) if state.is_completed() else {}
        return row | {column: metrics.get(metric) for column, metric in COLUMNS.items()}

    try:
        with ThreadPoolExecutor(experiments_at_once) as pool:
            # Prefect finds the flow run that a subflow belongs to in the context, which threads do not inherit.
            begun = [pool.submit(copy_context().run, run, number) for number in range(len(asked))]
            rows = [future.result() for future in begun]
    finally:
        Processes.stop_all()
    results = root / "results/sweeps"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    create_table_artifact(rows, key="sweep", description="One row a point of the sweep.")
    if picture := _plot(rows):
        (results / f"{name}.svg").write_text(picture, encoding="utf-8")
        publish_picture(picture, key="sweep-plot", description="BrierLM against training FLOPs, a point each.")
    logger.info(f"compared in {results / name}.json and .svg; `dvc exp show` lists the experiments")
    if failed := [row["experiment"] for row in rows if row["state"] != "Completed"]:
        if len(failed) == len(rows):
            raise RuntimeError("every point of the sweep failed")
        logger.warning(f"failed: {', '.join(failed)}")
    return rows


def _plot(rows: list[dict[str, Any]]) -> str:
    # Here: flows start without matplotlib.
    from calm_core.report.figures import CALM, TRANSFORMER, brierlm_against_flops

    models: dict[str, dict[str, Any]] = {}
    for row in rows:
        for kind, colour in (("calm", CALM), ("transformer", TRANSFORMER)):
            score, flops = row[f"{kind} BrierLM"], row[f"{kind} training FLOPs"]
            # The branch that a param does not concern has the same result at every point: shown once.
            same = {"brierlm": score, "brierlm_ci95": [score, score], "training_flops": flops, "colour": colour}
            if score is not None and flops and same not in models.values():
                label = "Transformer" if kind == "transformer" else re.sub(r"(^| )\w+\.", r"\1", row["overrides"])
                models[label] = same
    return brierlm_against_flops(models) if models else ""


def _asked() -> tuple[dict[str, list[Any]], list[list[str]]]:
    return runtime.flow_run.parameters["grid"], runtime.flow_run.parameters["points"]


if __name__ == "__main__":
    sweep(grid={"calm.head": ["energy", "flow"]})
