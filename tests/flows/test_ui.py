"""What people see: the run's page in a real browser, and the deployments that `make ui` serves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests import ROOT
from tests.flows.conftest import until
from tests.flows.test_reproduce import artifacts, flow_run_of, reproduced

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PLOT_COLOUR = (0x00, 0xC8, 0x53)
"""Of the plot in the small project's report."""
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1500",
    "--virtual-time-budget=20000",
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium")
def test_the_page_of_a_run_shows_stages_states_and_artifacts(server: str, project: Path, tmp_path: Path) -> None:
    reproduced(project)
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("value: 1", "value: 2"))
    flow_run = flow_run_of(reproduced(project))

    def visit(page: str, *options: str) -> str:
        command = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'browser'}", *options, f"{server}/{page}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    def shows(page: str, *texts: str) -> bool:
        dom = visit(page, "--dump-dom")
        return all(text in dom for text in texts)

    page = f"runs/flow-run/{flow_run}"
    until(lambda: shows(page, "reproduce", "git:", "first", "left", "right", "last", "Cached", "Completed"), 120)
    until(lambda: shows("artifacts", "metrics", "params", "plots", "progress-left-left"), 120)
    screenshot = tmp_path / "prefect.png"
    visit(page, f"--screenshot={screenshot}")
    assert screenshot.stat().st_size > 10_000

    def plot_is_seen() -> bool:
        visit(f"artifacts/artifact/{artifacts(server, flow_run)['plots']['id']}", f"--screenshot={screenshot}")
        with Image.open(screenshot) as picture:
            colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 24) or []}
        return colours.get(PLOT_COLOUR, 0) > 1000

    until(plot_is_seen, 120)


def test_deployments_are_those_of_prefect_yaml(server: str) -> None:
    from flows.serve import deployments

    described = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    served = deployments()
    names = ["on-demand", "nightly", "weekly-sweep", "both-models", "study"]
    assert [one.name for one in served] == [one["name"] for one in described] == names
    assert served[1].schedules[0].schedule.cron == "0 2 * * *"
    assert served[2].parameters == described[2]["parameters"]
    assert served[4].parameters == {"hours": 3.0}
    assert not served[0].schedules


@pytest.mark.parametrize("variable", ["HOME", "PREFECT_HOME"])
def test_a_home_that_cannot_be_written(variable: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_HOME"}
    program = "import flows, os; print(os.environ.get('PREFECT_HOME'))"

    def home(folder: Path) -> tuple[str, str]:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "PYTHONPATH": str(ROOT), variable: str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        return ended.stdout.strip(), ended.stderr

    own = str(ROOT / ".dvc/tmp/prefect")
    found, told = home(tmp_path / "file/home")
    assert found == own
    assert len(told.splitlines()) == 1
    assert told.startswith(f"Prefect cannot write in {'~/.prefect' if variable == 'HOME' else tmp_path}")
    assert home(tmp_path) == ("None" if variable == "HOME" else str(tmp_path), "")
