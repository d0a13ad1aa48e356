"""A real Prefect server on a free loopback port, and a small DVC project to run flows on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

BIN = Path(sys.executable).parent

STEP = """
import json, os, pathlib, sys, time, yaml
name = sys.argv[1]
params = yaml.safe_load(open("params.yaml"))["toy"]
print(f"{name} begins with value {params['value']}", flush=True)
print(f"{name}: 1,000/2,000 tokens, 10/s, 1 s left", flush=True)
print(f"{name}: 2,000/2,000 tokens, 10/s, 0 s left", flush=True)
pathlib.Path(f"pid-{name}").write_text(str(os.getpid()))
while pathlib.Path(f"hold-{name}").exists():
    time.sleep(0.05)
if name == params["fail"]:
    sys.exit(f"{name} cannot go on: the value is {params['value']}")
if name == "last":
    pathlib.Path("results").mkdir(exist_ok=True)
    score = {"calm": {"brierlm": 1.0 * params["value"]}, "transformer": {"brierlm": 2.0}}
    pathlib.Path("results/brierlm.json").write_text(json.dumps(score))
    run = {"calm": {"training_flops_with_autoencoder": 1e9 * params["value"]}, "transformer": {"training_flops": 3e9}}
    pathlib.Path("results/flops.json").write_text(json.dumps({"run": run}))
    plot = "<svg viewBox='0 0 9 9'><rect width='9' height='9' fill='#00c853'/></svg>"
    pathlib.Path("results/report.html").write_text(f"<p>{plot}</p>")
pathlib.Path(f"{name}.out").write_text(f"{name} {params['value']}")
"""

PIPELINE: dict[str, Any] = {
    "stages": {
        "first": {"cmd": "python step.py first", "params": ["toy.start"], "outs": ["first.out"]},
        "left": {
            "cmd": "python step.py left",
            "deps": ["first.out"],
            "params": ["toy.value", "toy.fail"],
            "outs": ["left.out"],
        },
        "right": {"cmd": "python step.py right", "deps": ["first.out"], "outs": ["right.out"]},
        "last": {
            "cmd": "python step.py last",
            "deps": ["left.out", "right.out"],
            "params": ["toy.value"],
            "outs": ["last.out", "results/report.html"],
            "metrics": ["results/brierlm.json", "results/flops.json"],
        },
    }
}


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def until(ready: Callable[[], Any], seconds: float = 60) -> Any:
    """What ``ready`` gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {ready}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with a database of its own."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_API_URL": f"{address}/api",
    }
    old = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    log = (home / "server.log").open("w")
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def healthy() -> bool:
        assert process.poll() is None, (home / "server.log").read_text()
        try:
            return httpx.get(f"{address}/api/health").is_success
        except httpx.HTTPError:
            return False

    try:
        until(healthy, 120)
        with temporary_settings({PREFECT_API_URL: settings["PREFECT_API_URL"]}):
            yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # nothing of it is needed any more
        process.wait(30)
        for name, value in old.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def commit_project(folder: Path) -> None:
    """Make ``folder`` a git and DVC project, all that is in it committed."""
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "config", "user.name", "test")
    run(folder, "git", "config", "user.email", "test@example.org")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "project")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC project of four small stages: first -> left and right -> last."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "step.py").write_text(STEP)
    (folder / "params.yaml").write_text("toy:\n  start: 0 # a comment that stays\n  value: 1\n  fail: ''\n")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    (folder / ".gitignore").write_text("*.out\npid-*\nhold-*\nresults/\n")
    commit_project(folder)
    return folder


@pytest.fixture()
def project(template: Path, tmp_path: Path) -> Path:
    """A copy of the project in which nothing has run."""
    return Path(shutil.copytree(template, tmp_path / "project"))
