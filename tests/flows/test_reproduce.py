"""The flow against a real server: what runs, what is cached, what fails, what a cancelled run leaves."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.processes import Processes
from flows.reproduce import dvc_stage, reproduce
from tests import ROOT
from tests.flows.conftest import run, until

SERVED = """
import sys
from datetime import timedelta
from prefect import serve
from prefect.schedules import Interval
from flows.reproduce import reproduce

folder, every = sys.argv[1], float(sys.argv[2])
schedules = [Interval(timedelta(seconds=every))] if every else []
deployment = reproduce.to_deployment("test-" + sys.argv[3], parameters={"folder": folder}, schedules=schedules)
serve(deployment)
"""


def post(server: str, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server}/api/{path}", json=body, timeout=30)
    answer.raise_for_status()
    return answer.json()


def task_states(server: str, flow_run: str, never_begun: str = "") -> dict[str, str]:
    """The states that the tasks of a flow ended in; the server may learn of them after the flow has ended.

    The task ``never_begun`` may stay as it is, since what it needs failed.
    """

    def ended() -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = post(server, "task_runs/filter", task_runs={"flow_run_id": {"any_": [flow_run]}})
        open_states = {run["state_type"] for run in runs if run["name"] != never_begun} & {"PENDING", "RUNNING"}
        return [] if open_states else runs

    return {run["name"]: run["state_name"] for run in until(ended)}


def artifacts(server: str, flow_run: str) -> dict[str, Any]:
    found = post(server, "artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}})
    return {artifact["key"]: artifact for artifact in found}


def logs(server: str, flow_run: str) -> str:
    found = post(server, "logs/filter", logs={"flow_run_id": {"any_": [flow_run]}}, limit=200)
    return "\n".join(line["message"] for line in found)


def reproduced(project: Path, **parameters: Any) -> Any:
    return reproduce(folder=str(project), return_state=True, **parameters)


def flow_run_of(state: Any) -> str:
    return str(state.state_details.flow_run_id)


def edit(project: Path, old: str, new: str) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace(old, new))


def test_a_fresh_run_then_a_cached_one_then_a_change(server: str, project: Path) -> None:
    first = reproduced(project)
    assert first.is_completed()
    assert task_states(server, flow_run_of(first)) == dict.fromkeys(("first", "left", "right", "last"), "Completed")
    until(lambda: "left begins with value 1" in logs(server, flow_run_of(first)))
    shown = artifacts(server, flow_run_of(first))
    assert "brierlm: calm.brierlm" in shown["metrics"]["data"]
    assert "value: 1" in shown["params"]["data"]
    assert "data:image/svg+xml" in shown["plots"]["data"]
    assert shown["progress-left-left"]["data"] == 100.0
    flow_run = httpx.get(f"{server}/api/flow_runs/{flow_run_of(first)}").json()
    commit = run(project, "git", "rev-parse", "--short", "HEAD").strip()
    assert flow_run["name"].startswith(f"reproduce {commit}")
    assert any(tag.startswith(f"git:{commit}") for tag in flow_run["tags"])
    assert any(tag.startswith("params:") for tag in flow_run["tags"])

    second = reproduced(project)
    assert task_states(server, flow_run_of(second)) == dict.fromkeys(("first", "left", "right", "last"), "Cached")

    edit(project, "value: 1", "value: 5")
    third = reproduced(project)
    assert task_states(server, flow_run_of(third)) == {
        "first": "Cached",
        "right": "Cached",
        "left": "Completed",
        "last": "Completed",
    }
    metrics = artifacts(server, flow_run_of(third))["metrics"]["data"]
    assert re.search(r'"metric": "brierlm: calm.brierlm", "value": "5", "before": "1", "change": "4"', metrics)

    edit(project, "value: 5", "value: 1")
    fourth = reproduced(project)  # from DVC's run cache
    assert set(task_states(server, flow_run_of(fourth)).values()) == {"Cached"}
    assert (project / "left.out").read_text() == "left 1"


@pytest.mark.slow
def test_a_stage_that_always_runs(server: str, project: Path) -> None:
    """What needs it runs when its output is another one."""
    watching = (project / "dvc.yaml").read_text() + (
        "  watch:\n    cmd: cp text.txt watch.out\n    always_changed: true\n    outs: [watch.out]\n"
        "  reader:\n    cmd: cp watch.out reader.out\n    deps: [watch.out]\n    outs: [reader.out]\n"
    )
    (project / "dvc.yaml").write_text(watching)
    (project / "text.txt").write_text("one")
    states = [task_states(server, flow_run_of(reproduced(project, targets=["reader"]))) for _ in range(2)]
    assert states == [{"watch": "Completed", "reader": "Completed"}, {"watch": "Completed", "reader": "Cached"}]
    (project / "text.txt").write_text("two")
    again = task_states(server, flow_run_of(reproduced(project, targets=["reader"])))
    assert again == {"watch": "Completed", "reader": "Completed"}
    assert (project / "reader.out").read_text() == "two"


@pytest.mark.slow
def test_targets_and_force(server: str, project: Path) -> None:
    assert reproduced(project).is_completed()
    forced = reproduced(project, targets=["left"], force=True)
    assert task_states(server, flow_run_of(forced)) == {"first": "Completed", "left": "Completed"}
    unknown = reproduced(project, targets=["nothing"])
    assert unknown.is_failed()
    assert "nothing is no stage; there are: first" in unknown.message


@pytest.mark.slow
def test_a_failing_stage_tells_why_and_the_next_run_goes_on(server: str, project: Path) -> None:
    edit(project, "fail: ''", "fail: left")
    failed = reproduced(project)
    assert failed.is_failed()
    states = task_states(server, flow_run_of(failed), never_begun="last")
    assert states["left"] == "Failed"
    assert states["right"] == states["first"] == "Completed"
    assert states["last"] in ("NotReady", "Pending")
    runs = post(server, "task_runs/filter", task_runs={"flow_run_id": {"any_": [flow_run_of(failed)]}})
    (left,) = [task_run for task_run in runs if task_run["name"] == "left"]
    assert "exit status" in left["state"]["message"]
    assert "left cannot go on: the value is 1" in left["state"]["message"]
    assert left["run_count"] == 1  # wrong params are not tried again
    edit(project, "fail: left", "fail: ''")
    again = reproduced(project)
    assert task_states(server, flow_run_of(again))["right"] == "Cached"
    assert again.is_completed()


@pytest.mark.slow
def test_overrides_become_an_experiment_and_leave_the_tree_alone(server: str, project: Path) -> None:
    assert reproduced(project).is_completed()
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "ran")
    before = {path: (project / path).read_bytes() for path in ("params.yaml", "dvc.lock", "left.out")}
    changed = reproduced(project, overrides=["toy.value=7"], experiment="seven")
    assert changed.is_completed()
    assert changed.result()["brierlm: calm.brierlm"] == 7
    assert task_states(server, flow_run_of(changed))["right"] == "Cached"
    assert {path: (project / path).read_bytes() for path in before} == before
    assert "seven" in run(project, "dvc", "exp", "show", "--csv")
    run(project, "dvc", "exp", "apply", "seven")
    assert (project / "left.out").read_text() == "left 7"
    assert "value: 7" in (project / "params.yaml").read_text()
    wrong = reproduced(project, overrides=["toy.nothing=7"])
    assert wrong.is_failed()
    assert "sets no key of params.yaml" in wrong.message
    assert not list((project / ".dvc/tmp/flows").iterdir())


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_or_waits(server: str, project: Path) -> None:
    script = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    (project / ".dvc/tmp").mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(project / ".dvc/tmp/flows.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    holder.stdout.readline()
    refused = reproduced(project, wait_for_others=False)
    assert refused.is_failed()
    assert "another flow run works in" in refused.message
    holder.stdin.close()
    holder.wait()
    assert reproduced(project, wait_for_others=False).is_completed()


class Served:
    """A process that serves the flow for one project."""

    def __init__(self, project: Path, name: str, every: float = 0) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
        command = [sys.executable, "-c", SERVED, str(project), str(every), name]
        self.process = subprocess.Popen(command, env=environment, cwd=project, start_new_session=True)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: Any) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


def deployment(server: str, name: str) -> Any:
    found = post(server, "deployments/filter", deployments={"name": {"any_": [name]}})
    return found[0] if found else None


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def family(pid: int) -> list[int]:
    """A stage's process, the DVC that runs it, and the guard of both."""
    names = {"dvc", "guard.py"}
    above = psutil.Process(pid).parents()
    return [pid, *(one.pid for one in above if names & {Path(argument).name for argument in one.cmdline()})]


@pytest.mark.slow
def test_a_cancelled_run_leaves_no_process_and_no_lock(server: str, project: Path) -> None:
    (project / "hold-left").touch()
    with Served(project, "cancel"):
        found = until(lambda: deployment(server, "test-cancel"))
        flow_run = post(server, f"deployments/{found['id']}/create_flow_run")["id"]
        pid = int(until(lambda: (project / "pid-left").exists() and (project / "pid-left").read_text(), 120))
        assert alive(pid)
        started = family(pid)
        until(lambda: (project / "right.out").exists())  # beside the one that is held
        post(server, f"flow_runs/{flow_run}/set_state", state={"type": "CANCELLING"}, force=True)
        until(lambda: not any(alive(one) for one in started))
        until(lambda: httpx.get(f"{server}/api/flow_runs/{flow_run}").json()["state_type"] == "CANCELLED")
    (project / "hold-left").unlink()
    assert reproduced(project, wait_for_others=False).is_completed()


def test_killing_the_run_kills_its_stage(project: Path) -> None:
    """As by the kernel when memory runs out: nobody can clean up any more."""
    (project / "hold-first").touch()
    code = (
        "import sys; from pathlib import Path; from flows.processes import Processes\n"
        "Processes().run(['dvc', 'repro', '-s', 'first'], Path(sys.argv[1]), print)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asking = subprocess.Popen([sys.executable, "-c", code, str(project)], env=environment)
    pid = int(until(lambda: (project / "pid-first").exists() and (project / "pid-first").read_text()))
    started = family(pid)
    assert len(started) > 2
    asking.kill()
    asking.wait()
    until(lambda: not any(alive(one) for one in started))
    (project / "hold-first").unlink()
    run(project, "dvc", "repro", "-s", "first")


@pytest.mark.slow
def test_a_schedule_starts_a_run_by_itself(server: str, project: Path) -> None:
    with Served(project, "scheduled", every=15):
        found = until(lambda: deployment(server, "test-scheduled"))

        def completed() -> bool:
            runs = post(server, "flow_runs/filter", flow_runs={"deployment_id": {"any_": [found["id"]]}})
            return any(one["state_type"] == "COMPLETED" and one["auto_scheduled"] for one in runs)

        until(completed, 120)
        httpx.delete(f"{server}/api/deployments/{found['id']}")
    assert (project / "last.out").exists()


def test_output_and_status_of_a_command(tmp_path: Path) -> None:
    lines: list[str] = []
    status = Processes().run(["sh", "-c", "echo out; echo err >&2; exit 7"], tmp_path, lines.append)
    assert status == 7
    assert sorted(lines) == ["err", "out"]


def test_a_stopped_run_starts_nothing_more(tmp_path: Path) -> None:
    processes = Processes()
    processes.stop()
    with pytest.raises(RuntimeError, match="the run was stopped"):
        processes.run(["true"], tmp_path, print)


@pytest.mark.slow
def test_a_network_that_was_away_is_tried_again(server: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reproduce.dvc_stage", dvc_stage.with_options(retry_delay_seconds=0))
    step = project / "step.py"
    away = "import pathlib, sys\nif not pathlib.Path('tried').exists():\n    pathlib.Path('tried').touch()\n"
    step.write_text(away + "    sys.exit('ConnectionError: the hub does not answer')\n" + step.read_text())
    passed = reproduced(project, targets=["first"])
    assert passed.is_completed()
    runs = post(server, "task_runs/filter", task_runs={"flow_run_id": {"any_": [flow_run_of(passed)]}})
    assert [one["run_count"] for one in runs] == [2]
