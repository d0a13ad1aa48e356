"""The study resumes point by point, goes on past failures, and works with DVC: tiny points through real stages."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from calm_core.errors import CalmError
from calm_core.storage.yaml_io import read_yaml
from calm_core.study.point import TRANSFORMER, Point, calm
from flows import study as flow
from flows.study import base_digest, merged, plan_table, point_name, scores_of, study, write_page
from tests import ROOT
from tests.calm_core.study.made_up import point
from tests.flows.conftest import commit_project, run
from tests.flows.test_reproduce import artifacts, flow_run_of

STEP = """
import json, pathlib, sys, yaml
name = sys.argv[1]
params = yaml.safe_load(open("params.yaml"))
with open({log!r}, "a") as log:
    log.write(name + chr(10))
once = pathlib.Path({fail!r})
if once.exists() and once.read_text() == name:
    once.unlink()
    sys.exit("it fails this once")
made = pathlib.Path(name)
made.mkdir(exist_ok=True)
if name.startswith("evaluate"):
    model = name.removeprefix("evaluate_")
    section = params[model]
    score = section["steps"] * section["batch_sequences"] / 100
    pathlib.Path("results/scores").mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"results/scores/{{model}}.json").write_text(json.dumps(
        {{"brierlm": score, "brierlm_ci95": [0.9 * score, 1.1 * score], "bits_per_byte": 3 / score}}))
else:
    (made / "out").write_text(json.dumps(params))
"""

NEEDS = {
    "train_autoencoder": ("", ["autoencoder"]),
    "train_calm": ("train_autoencoder", ["calm"]),
    "train_transformer": ("", ["transformer"]),
    "evaluate_calm": ("train_calm", ["evaluation"]),
    "evaluate_transformer": ("train_transformer", ["evaluation"]),
}
"""Each stage of the small pipeline: which other it needs, and its params."""


@pytest.fixture()
def tiny(tmp_path: Path) -> Path:
    """A project with the real params.yaml at the sizes of the preset smoke, and stages that train nothing."""
    folder = tmp_path / "project"
    folder.mkdir()
    params = read_yaml(ROOT / "params.yaml")
    for section, values in read_yaml(ROOT / "presets/smoke.yaml").items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (folder / "step.py").write_text(STEP.format(log=str(tmp_path / "ran"), fail=str(tmp_path / "fail")))
    stages: dict[str, Any] = {}
    for name, (needed, sections) in NEEDS.items():
        stages[name] = {"cmd": f"python step.py {name}", "deps": ["step.py"], "params": sections}
        if needed:
            stages[name]["deps"].append(f"{needed}/out")
        if name.startswith("evaluate"):
            stages[name]["metrics"] = [f"results/scores/{name.removeprefix('evaluate_')}.json"]
        else:
            stages[name]["outs"] = [f"{name}/out"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (folder / ".gitignore").write_text("results/\n" + "".join(f"{name}/\n" for name in NEEDS))
    commit_project(folder)
    return folder


class FakeReproduce:
    """Counts its calls; fails where ``fails`` says so."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fails: Callable[[list[str]], bool] = lambda overrides: False

    def __call__(self, overrides: list[str], **others: Any) -> Any:
        self.asked.append(overrides)
        completed = not self.fails(overrides)
        (stage,) = others["targets"]
        file = stage.removeprefix("evaluate_")
        metrics = {f"{file}: brierlm": 1.0, f"{file}: brierlm_ci95.0": 0.8, f"{file}: brierlm_ci95.1": 1.2}
        return SimpleNamespace(is_completed=lambda: completed, result=lambda: metrics)


PLANNED = [replace(point(model, budget, 1.0), state="planned", seconds=None, scores={})
           for budget in (1e12, 2e12) for model in (TRANSFORMER, calm(4))]  # fmt: skip


@pytest.fixture()
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeReproduce:
    """In place of `reproduce`, of the plan and, for speed, of the page, which says how many points it has seen done."""
    made = FakeReproduce()

    def page(root: Path) -> None:
        states = [one["state"] for one in recorded(root)]
        (root / flow.PAGE).write_text(f"{states.count('completed')} done, {states.count('failed')} failed")

    monkeypatch.setattr(flow, "write_page", page)
    monkeypatch.setattr(flow, "reproduce", made)
    plan = {"machine": {"processor": "none"}, "rates": {}, "points": [one.as_json() for one in PLANNED]}
    monkeypatch.setattr(flow, "_plan", lambda root, asked: plan)
    return made


def recorded(project: Path) -> list[dict[str, Any]]:
    return json.loads((project / "results/study.json").read_text())["points"]


def test_a_study_goes_on_where_it_was(server: str, tiny: Path, fake: FakeReproduce) -> None:
    def killed(overrides: list[str]) -> bool:
        if overrides == PLANNED[3].overrides:
            raise KeyboardInterrupt
        return overrides == PLANNED[1].overrides

    fake.fails = killed
    with pytest.raises(KeyboardInterrupt):
        study(folder=str(tiny))
    assert [one["state"] for one in recorded(tiny)] == ["completed", "failed", "completed", "planned"]
    assert (tiny / flow.PAGE).read_text() == "2 done, 1 failed"
    write_page(tiny)
    assert "2 of 4 trainings are done, 1 failed" in (tiny / flow.PAGE).read_text()
    # Only what is missing, the failed one among it.
    fake.asked.clear()
    fake.fails = lambda overrides: False
    state = study(folder=str(tiny), return_state=True)
    assert fake.asked == [PLANNED[1].overrides, PLANNED[3].overrides]
    assert [one["state"] for one in state.result()] == ["completed"] * 4
    assert recorded(tiny)[0]["scores"] == {"brierlm": 1.0, "brierlm_low": 0.8, "brierlm_high": 1.2}
    assert "CALM, K = 4" in artifacts(server, flow_run_of(state))["study"]["data"]
    # Nothing is left to do; another text of the params is another study.
    fake.asked.clear()
    study(folder=str(tiny))
    assert not fake.asked
    params = tiny / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 1"))
    study(folder=str(tiny))
    assert len(fake.asked) == 4


def test_a_dry_run_runs_nothing_and_all_failed_fails(server: str, tiny: Path, fake: FakeReproduce) -> None:
    assert len(study(folder=str(tiny), dry_run=True)) == 4
    assert not fake.asked
    assert not (tiny / "results").exists()
    fake.fails = lambda overrides: True
    with pytest.raises(RuntimeError, match="every point of the study failed"):
        study(folder=str(tiny))


def test_hours_that_are_spent_end_a_study(server: str, tiny: Path, fake: FakeReproduce) -> None:
    flow.write_json(
        tiny / flow.RECORD,
        {
            "digest": base_digest(tiny),
            "points": [replace(PLANNED[0], state="completed", seconds=3700.0).as_json()],
        },
    )
    found = study(folder=str(tiny), hours=1.0)
    assert not fake.asked
    assert [one["state"] for one in found] == ["completed", "planned", "planned", "planned"]


@pytest.mark.slow
def test_tiny_points_through_dvc(server: str, tiny: Path) -> None:
    # Speeds are given, as by an earlier run: the plan does not depend on the machine. They are far too slow, so that
    # the hours are never spent.
    begun = {"digest": base_digest(tiny), "rates": {"transformer": 1e6, "calm": {"4": 1e6}}, "points": []}
    small: Any = {"folder": str(tiny), "hours": 20.0, "patch_sizes": [4], "widths": [1.0], "smallest_budget": 1e9}
    flow.write_json(tiny / flow.RECORD, begun)
    (tiny.parent / "fail").write_text("evaluate_transformer")
    points = [Point(**one) for one in study(**small)]
    assert [one.model for one in points] == [TRANSFORMER, calm(4), TRANSFORMER, calm(4)]
    assert [one.state for one in points] == ["failed", "completed", "completed", "completed"]
    # A Transformer's point trains no CALM, and two points of a K share its autoencoder.
    trained = {"train_transformer": 2, "train_autoencoder": 1, "train_calm": 2}
    log = tiny.parent / "ran"
    assert {name: log.read_text().split().count(name) for name in trained} == trained
    for one in points[1:]:
        settings = dict(override.split("=") for override in one.overrides)
        name = TRANSFORMER if one.model == TRANSFORMER else "calm"
        score = int(settings[f"{name}.steps"]) * int(settings[f"{name}.batch_sequences"]) / 100
        assert one.scores["brierlm"] == score
        assert one.scores["bits_per_byte"] == pytest.approx(3 / score)
    names = [point_name(one, base_digest(tiny)) for one in points]
    assert set(run(tiny, "dvc", "exp", "list", "--name-only").split()) == set(names[1:])
    # Without its record a second study finds in DVC's cache what is done, and does the rest.
    shutil.rmtree(tiny / "results")
    flow.write_json(tiny / flow.RECORD, begun)
    again = [Point(**one) for one in study(**small)]
    assert [one.scores for one in again[1:]] == [one.scores for one in points[1:]]
    assert again[0].state == "completed"
    assert {name: log.read_text().split().count(name) for name in trained} == trained
    assert "4 of 4 trainings are done" in (tiny / flow.PAGE).read_text()


def test_names_stand_for_overrides_params_and_code(tiny: Path) -> None:
    digest = base_digest(tiny)
    one = PLANNED[0]
    assert base_digest(tiny) == digest
    assert point_name(one, digest).startswith("study-transformer-128-1e12-")
    assert point_name(one, digest) != point_name(replace(one, overrides=["seed=1"]), digest)
    # What the stages do not depend on changes nothing; their code, committed or not, does.
    (tiny / "README.md").write_text("new")
    run(tiny, "git", "add", "README.md")
    assert base_digest(tiny) == digest
    (tiny / "step.py").write_text("pass")
    assert base_digest(tiny) != digest
    run(tiny, "git", "checkout", "--quiet", "step.py")
    assert base_digest(tiny) == digest
    # A comment in params.yaml is no param.
    params = tiny / "params.yaml"
    params.write_text(params.read_text() + "# a comment\n")
    assert base_digest(tiny) == digest


def test_names_stand_for_the_user_s_text(tiny: Path) -> None:
    # Of what botocore brings nothing is read.
    default = base_digest(tiny)
    assert not (tiny / ".checkpoints").exists()
    with (tiny / ".gitignore").open("a") as ignored:
        ignored.write("text/\n.checkpoints/\n")
    params = yaml.safe_load((tiny / "params.yaml").read_text())
    params["corpus"] |= {"source": "files", "paths": ["text/*.txt"]}
    (tiny / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (tiny / "text").mkdir()
    (tiny / "text/one.txt").write_text("a text")
    digest = base_digest(tiny)
    assert digest not in (default, "")
    assert base_digest(tiny) == digest
    (tiny / "text/one.txt").write_text("another")
    assert base_digest(tiny) != digest
    (tiny / "text/one.txt").write_text("a text")
    assert base_digest(tiny) == digest
    (tiny / "text/one.txt").unlink()
    with pytest.raises(CalmError, match="matches no file"):
        base_digest(tiny)


def test_fewer_hours_keep_what_is_done() -> None:
    done = replace(PLANNED[2], state="completed", seconds=9.0, scores={"brierlm": 2.0})
    failed = replace(PLANNED[3], state="failed", seconds=5.0)
    assert merged(PLANNED[:2], [done, failed]) == [*PLANNED[:2], done]
    assert merged(PLANNED, [done, failed]) == [*PLANNED[:2], done, failed]


OF_TRANSFORMER = point(TRANSFORMER, 1e12, 1.0)


def test_scores_are_those_of_the_point_s_model() -> None:
    metrics = {
        "calm: brierlm": 1.0,
        "calm: brierlm_ci95.0": 0.5,
        "calm: brierlm_ci95.1": 1.5,
        "transformer: brierlm": 2,
    }
    assert scores_of(point(calm(4), 1e12, 1.0), metrics) == {"brierlm": 1.0, "brierlm_low": 0.5, "brierlm_high": 1.5}
    of_transformer = scores_of(OF_TRANSFORMER, metrics | {"transformer: bits_per_byte": 1.5})
    assert of_transformer["bits_per_byte"] == 1.5


def test_the_autoencoder_s_share_is_a_score_of_a_calm_that_has_one() -> None:
    metrics = {"autoencoder: token_accuracy": 0.98, "calm: brierlm": 1.0, "transformer: brierlm": 2.0}
    assert scores_of(point(calm(8), 1e12, 1.0, autoencoder_flops=1e9), metrics) == {
        "brierlm": 1.0,
        "token_accuracy": 0.98,
    }
    assert scores_of(point(calm(8), 1e12, 1.0), metrics) == {"brierlm": 1.0}
    assert scores_of(OF_TRANSFORMER, metrics) == {"brierlm": 2.0}


def test_bits_a_byte_take_the_interval_that_there_is() -> None:
    bits = {"transformer: bits_per_byte": 1.5}
    nats = {
        "transformer: nats_per_token": 3.0,
        "transformer: nats_per_token_ci95.0": 2.8,
        "transformer: nats_per_token_ci95.1": 3.4,
    }
    own = {"transformer: bits_per_byte_ci95.0": 1.3, "transformer: bits_per_byte_ci95.1": 1.6}
    assert scores_of(OF_TRANSFORMER, bits) == {"bits_per_byte": 1.5}
    scaled = scores_of(OF_TRANSFORMER, bits | nats)
    assert (scaled["bits_per_byte_low"], scaled["bits_per_byte_high"]) == pytest.approx((1.4, 1.7))
    told = scores_of(OF_TRANSFORMER, bits | nats | own)
    assert (told["bits_per_byte_low"], told["bits_per_byte_high"]) == (1.3, 1.6)


def test_the_plan_as_a_table() -> None:
    console = Console(width=120, record=True, file=sys.stdout)
    console.print(plan_table([replace(PLANNED[0], state="completed", seconds=120.0), *PLANNED[1:]]))
    shown = console.export_text()
    assert "(2.0)" in shown
    assert "4 points, 3 of them to run, 3 minutes" in shown
