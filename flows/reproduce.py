"""The flow `reproduce`: the pipeline's stages as tasks, read from DVC's graph; DVC decides what runs.

Each task runs its stage alone, through DVC, and ends Completed if the stage ran or Cached if DVC found it up to date or
restored it. Stages that do not depend on each other run at the same time.
"""

import asyncio
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from prefect import flow, get_client, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from calm_core.checkout import require_checkout
from flows.artifacts import StageProgress, publish_metrics, publish_params, publish_report
from flows.pipeline import UNCHANGED, Graph, StageError, changed_stages, read_graph, read_metrics, run_stage
from flows.processes import Processes
from flows.workspaces import (
    copy_with_overrides,
    exclusive,
    params_digest,
    require_experiment_name,
    revision,
    save_experiment,
)

ROOT = Path(__file__).resolve().parents[1]

RETRIES, FIRST_DELAY_SECONDS = 3, 10


def _can_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failed stage deserves another try: a network that was away, never wrong params."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.transient


@task(
    task_run_name="{stage}",
    # DVC decides what is up to date; a second cache of Prefect's would contradict it.
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(FIRST_DELAY_SECONDS),
    retry_condition_fn=_can_pass,
)
def dvc_stage(stage: str, folder: Path, current: bool, force: bool, processes: Processes) -> State[None]:
    """Bring ``stage`` up to date in ``folder``; ``current`` says that DVC has found it so already."""
    logger, progress = get_run_logger(), StageProgress(stage)
    # Without starting DVC, which takes seconds for each stage.
    if current:
        return Completed(name="Cached", message="up to date")

    def read(line: str) -> None:
        logger.info(line)
        progress.read(line)

    outcome = run_stage(folder, stage, force, processes, read)
    if outcome.startswith("ran"):
        return Completed(message=outcome)
    return Completed(name="Cached", message=outcome)


def _run_name() -> str:
    parameters = runtime.flow_run.parameters
    folder = Path(parameters["folder"] or ROOT)
    return " ".join(["reproduce", revision(folder), *parameters["overrides"]])


@flow(name="reproduce", flow_run_name=_run_name, validate_parameters=True)
def reproduce(
    overrides: list[str] = [],  # noqa: B006 - Prefect shows it in the UI, and nothing changes it
    targets: list[str] = [],  # noqa: B006
    force: bool = False,
    at_once: int = 2,
    wait_for_others: bool = True,
    folder: str | None = None,
    experiment: str | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Bring the pipeline up to date, stage by stage; returns the metrics.

    Args:
        overrides: Changes of params.yaml for this run alone, as for `dvc exp run -S`: section.key=value. Such a run
            works in a copy and ends as a DVC experiment; params.yaml stays as it is.
        targets: Stages to bring up to date, with all that they need; none means every stage.
        force: Run the stages even where they are up to date.
        at_once: How many stages may run at the same time.
        wait_for_others: Wait for another flow run in the same folder; otherwise fail at once.
        folder: The repository; by default the one that this file lies in.
        experiment: Name of the DVC experiment that a run with overrides ends as.
        keep: Let a run with overrides end as a DVC experiment; without one its metrics are all that stays, and what
            its stages made is in DVC's cache.
    """
    logger, processes = get_run_logger(), Processes()
    root = Path(folder or ROOT).resolve()
    require_checkout(root, experiments=bool(overrides))
    digest = params_digest(root, overrides)
    _tag(revision(root), digest)
    try:
        if not overrides:
            with exclusive(root, wait_for_others, logger.info):
                return _bring_up_to_date(root, targets, force, at_once, processes, overrides)
        # Changes of metrics are shown against the tree, not against what the cache restores in the copy.
        before = read_metrics(root)
        name = experiment or f"flow-{digest}"
        require_experiment_name(root, name)
        with copy_with_overrides(root, overrides) as copy:
            processes.run(["dvc", "checkout", "--quiet", "--allow-missing"], copy, logger.info)
            metrics = _bring_up_to_date(copy, targets, force, at_once, processes, overrides, before)
            if keep:
                save_experiment(copy, root, name)
                logger.info(f"saved as the experiment {name}: `dvc exp show`, `dvc exp apply {name}`")
            return metrics
    finally:
        processes.stop()


def _bring_up_to_date(
    folder: Path,
    targets: list[str],
    force: bool,
    at_once: int,
    processes: Processes,
    overrides: list[str],
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    graph = read_graph(folder)
    graph = graph.with_ancestors(targets) if targets else graph
    before = read_metrics(folder) if before is None else before
    publish_params(folder / "params.yaml", overrides, revision(folder))
    # Once for all stages: `dvc status` hashes what they share a single time.
    changed = set(graph.dependencies) if force else changed_stages(folder, processes)
    failed = _run_all(graph, folder, changed, force, at_once, processes)
    after = read_metrics(folder)
    publish_metrics(before, after)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; what needs them was not run")
    publish_report(folder / "results/report.html")
    return after


def _run_all(
    graph: Graph, folder: Path, changed: set[str], force: bool, at_once: int, processes: Processes
) -> list[str]:
    """Run the stages of ``graph`` as their dependencies finish, ``at_once`` at a time; returns those that failed."""
    futures: dict[str, PrefectConcurrentFuture[Any]] = {}
    running: dict[Future[Any], str] = {}
    finished: dict[str, State[Any]] = {}
    ran: set[str] = set()
    while len(finished) < len(graph.dependencies):
        for name, needed in graph.dependencies.items():
            ready = name not in futures and needed <= finished.keys()
            if not ready or len(running) >= at_once:
                continue
            # Where nothing before it ran, what DVC said of a stage at the start still holds.
            current = name not in changed and not needed & ran
            # The futures are done already; passing them draws the edges in the UI's graph.
            upstream = [futures[before] for before in sorted(needed)]
            submitted: Any = dvc_stage.submit(name, folder, current, force, processes, wait_for=upstream)  # type: ignore[call-overload]
            # The wrapped future is one of concurrent.futures, on which ``wait`` can wait for the first of several.
            futures[name] = submitted
            running[submitted.wrapped_future] = name
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            name = running.pop(future)
            finished[name] = future.result()
            if finished[name].name != "Cached" and finished[name].message != UNCHANGED:
                ran.add(name)
    # Stages after a failed one are not run: Prefect ends them as not ready, which is no failure of their own.
    return [name for name, state in finished.items() if state.is_failed() or state.is_crashed()]


def _tag(commit: str, digest: str) -> None:
    """Say in the run's tags which code and which params it ran."""

    async def update() -> None:
        async with get_client() as client:
            flow_run = await client.read_flow_run(runtime.flow_run.id)
            tags = {*flow_run.tags, f"git:{commit}", f"params:{digest}"}
            await client.update_flow_run(flow_run.id, tags=sorted(tags))

    asyncio.run(update())


if __name__ == "__main__":
    reproduce()
