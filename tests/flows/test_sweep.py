"""A sweep of three points, one of which fails: the others go on, and the tree stays as it is."""

import json
from pathlib import Path

import pytest

from calm_core.storage.yaml_io import read_yaml
from flows.serve import deployments
from flows.sweep import combinations, sweep
from flows.workspaces import apply_overrides
from tests.flows.conftest import run
from tests.flows.test_reproduce import artifacts, edit, flow_run_of, reproduced


@pytest.mark.slow
def test_three_points_one_of_which_fails(server: str, project: Path) -> None:
    assert reproduced(project).is_completed()
    run(project, "git", "add", "--all")
    run(project, "git", "commit", "--quiet", "--message", "ran")
    edit(project, "start: 0", "start: 3")  # a change that is not committed: the points have it, and it stays
    before = {path: (project / path).read_bytes() for path in ("params.yaml", "dvc.lock", "left.out")}
    state = sweep(
        grid={"toy.value": [2, 3]},
        points=[["toy.fail=left"]],
        experiments_at_once=2,
        folder=str(project),
        return_state=True,
    )
    assert state.is_completed()
    rows = state.result()
    assert [row["state"] for row in rows] == ["Completed", "Completed", "Failed"]
    assert [row["calm BrierLM"] for row in rows] == [2, 3, None]
    assert {path: (project / path).read_bytes() for path in before} == before
    shown = artifacts(server, flow_run_of(state))
    assert "toy.value=2" in shown["sweep"]["data"]
    assert "data:image/svg+xml" in shown["sweep-plot"]["data"]
    (table,) = (project / "results/sweeps").glob("*.json")
    assert json.loads(table.read_text()) == rows
    assert table.with_suffix(".svg").read_text().startswith("<svg")
    listed = run(project, "dvc", "exp", "show", "--csv")
    assert rows[0]["experiment"] in listed
    assert rows[1]["experiment"] in listed
    run(project, "git", "checkout", "--quiet", "params.yaml")
    run(project, "dvc", "exp", "apply", rows[1]["experiment"])
    assert (project / "left.out").read_text() == "left 3"


def test_combinations() -> None:
    grid = {"calm.head": ["energy", "flow"], "autoencoder.patch_size": [2, 4]}
    assert combinations(grid, [["seed=1"]]) == [
        ['calm.head="energy"', "autoencoder.patch_size=2"],
        ['calm.head="energy"', "autoencoder.patch_size=4"],
        ['calm.head="flow"', "autoencoder.patch_size=2"],
        ['calm.head="flow"', "autoencoder.patch_size=4"],
        ["seed=1"],
    ]
    with pytest.raises(ValueError, match="a sweep needs a grid"):
        combinations({}, [])


def test_small_numbers_stay_numbers(tmp_path: Path) -> None:
    # As the UI sends them, as `prefect deploy` reads 1e-5, and as prefect.yaml has what is to be text.
    for value, key, expected in ((1e-5, "kl_weight", 1e-5), ("1e-5", "kl_weight", 1e-5), ("1.4", "version", "1.4")):
        (tmp_path / "params.yaml").write_text("toy:\n  kl_weight: 0.5\n  version: x\n")
        ((override,),) = combinations({f"toy.{key}": [value]}, [])
        apply_overrides(tmp_path / "params.yaml", [override])
        assert read_yaml(tmp_path / "params.yaml")["toy"][key] == expected


def test_served_deployments_have_numbers(tmp_path: Path) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_text(
        "deployments:\n  - name: one\n    description: x\n    entrypoint: flows/sweep.py:sweep\n"
        "    parameters:\n      grid:\n        autoencoder.kl_weight: [1e-5, 3e-4]\n"
    )
    (deployment,) = deployments(path)
    assert deployment.parameters["grid"] == {"autoencoder.kl_weight": [0.00001, 0.0003]}
