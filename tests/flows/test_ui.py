"""What people see: the run's page in a real browser, and the deployments that `make ui` serves."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

import flows.ui
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
    assert (
        [one.name for one in served] == [one["name"] for one in described] == ["on-demand", "nightly", "weekly-sweep"]
    )
    assert served[1].schedules[0].schedule.cron == "0 2 * * *"
    assert served[2].parameters == described[2]["parameters"]
    assert not served[0].schedules


@pytest.mark.parametrize("variable", ["HOME", "PREFECT_HOME"])
def test_a_home_that_cannot_be_written(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("HOME", "PREFECT_HOME", "PREFECT_API_URL", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    monkeypatch.setattr(flows.ui, "_answers", lambda address: False)
    with pytest.raises(
        SystemExit, match="cannot write its database in .*; set PREFECT_HOME to a folder that can be written"
    ):
        flows.ui.main()
