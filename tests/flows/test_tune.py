"""The flow `tune`: equal rules for both models, one experiment each; once with the pipeline itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.states import Completed, Failed

from calm_core.storage.yaml_io import read_yaml
from flows import tune as tune_module
from flows.pipeline import read_graph
from flows.tune import MODELS, trials_table, tune
from tests import ROOT
from tests.end_to_end.test_pipeline import clone
from tests.flows.conftest import run
from tests.flows.test_reproduce import artifacts, flow_run_of

RATE = "learning_rate"


class Pipeline:
    """Stands in for `reproduce`: the higher the learning rate, the better the score; remembers what it was asked."""

    def __init__(self, diverges: str = "") -> None:
        self.asked: list[dict[str, Any]] = []
        self.diverges = diverges

    def __call__(self, overrides: list[str] = [], **parameters: Any) -> Any:  # noqa: B006
        self.asked.append({"overrides": overrides, **parameters})
        if not parameters.get("return_state"):
            return {}
        (target,) = parameters["targets"]
        (model,) = (model for model, tuned in MODELS.items() if tuned.evaluation == target)
        rates = [float(text.split("=")[1]) for text in overrides if text.startswith(f"{model}.{RATE}=")]
        if self.diverges in (model, *map(str, rates)):
            return Failed(message=f"RuntimeError: failed: train_{model}; what needs them was not run")
        return Completed(data={f"{model}: brierlm": 100 * sum(rates), "another: brierlm": 1000.0})

    def trials(self, model: str) -> list[list[str]]:
        """Overrides of the trials of ``model``."""
        return [
            one["overrides"]
            for one in self.asked
            if any(text.startswith(f"{model}.steps=") for text in one["overrides"])
        ]


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    """A folder with what the flow itself reads of one in which the inputs are up to date."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/transformer_steps.json").write_text('{"steps": 1400}')
    return tmp_path


def tuned(folder: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> Any:
    monkeypatch.setattr(tune_module, "reproduce", pipeline)
    return tune(folder=str(folder), return_state=True, **parameters)


def test_both_models_get_the_same(server: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, first = Pipeline(), read_yaml(ROOT / "params.yaml")["calm"]
    state = tuned(tree, pipeline, monkeypatch, trials=3, budget=0.25)
    assert state.is_completed(), state.message
    prepared, *runs = pipeline.asked
    assert prepared["targets"] == ["encode_corpus", "match_compute", "tokenise"]
    always = {"evaluation.split=validation", "evaluation.seeds=[]", "evaluation.beside=[]"}
    assert all(always <= {*one["overrides"]} for one in runs)
    calm, transformer = pipeline.trials("calm"), pipeline.trials("transformer")
    assert len(calm) == len(transformer) == 3
    assert all(f"calm.steps={round(first['steps'] / 4)}" in one for one in calm)
    assert all("transformer.steps=350" in one for one in transformer)
    # The same random places, after params.yaml's own.
    values = [[[text.split("=")[1] for text in one if "rate=" in text] for one in ones] for ones in (calm, transformer)]
    assert values[0][1:] == values[1][1:]
    assert calm[0][4:7] == [
        f"calm.{rate}={first[rate]}" for rate in ("learning_rate", "embedding_learning_rate", "muon_learning_rate")
    ]
    # Experiments are the best alone, trained in full.
    kept = [one for one in runs if one["keep"]]
    assert [one["experiment"] for one in kept] == ["tune-calm-best", "tune-transformer-best"]
    assert all(one["experiment"] is None for one in runs if not one["keep"])
    assert not any("steps=" in text and "warmup" not in text for one in kept for text in one["overrides"])
    result = state.result()
    for model in MODELS:
        written = json.loads((tree / f"results/tune/{model}.json").read_text())
        assert written == result[model]
        best = max(written["trials"], key=lambda row: row["brierlm"])
        assert written["best"]["trial"] == best["trial"]
        assert [row["trial"] for row in written["in_full"]] == ["params.yaml", "best"]
        assert {*written["best"]["overrides"]} < {*kept[list(MODELS).index(model)]["overrides"]}
    table = (tree / "results/tune/trials.md").read_text()
    assert table == trials_table(result)
    assert table.count("**") == 4
    assert table.count("\n| params.yaml |") == 2
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 * (2 + 3 + 2)
    assert "tune-calm" in artifacts(server, flow_run_of(state))
    # Trials that were done count, under the same rules.
    again = Pipeline()
    assert tuned(tree, again, monkeypatch, models=["calm"], trials=4, budget=0.25).is_completed()
    assert len(again.trials("calm")) == 1
    assert again.trials("transformer") == []
    params = (tree / "params.yaml").read_text()
    (tree / "params.yaml").write_text(params.replace("seed: 0", "seed: 7"))
    other = Pipeline()
    assert tuned(tree, other, monkeypatch, models=["calm"], trials=2, budget=0.25).is_completed()
    assert len(other.trials("calm")) == 2


def test_a_trial_that_diverges_has_no_score_and_the_first_one_must_not(
    server: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline()
    assert tuned(tree, pipeline, monkeypatch, models=["calm"], trials=2).is_completed()
    second = next(text.split("=")[1] for text in pipeline.trials("calm")[1] if text.startswith("calm.learning_rate"))
    (tree / "results/tune/study.db").unlink()
    state = tuned(tree, Pipeline(diverges=second), monkeypatch, models=["calm"], trials=3)
    assert state.is_completed(), state.message
    assert [row["brierlm"] is None for row in state.result()["calm"]["trials"]] == [False, True, False]
    assert "| diverged |" in (tree / "results/tune/trials.md").read_text()
    (tree / "results/tune/study.db").unlink()
    failed = tuned(tree, Pipeline(diverges="calm"), monkeypatch, models=["calm"], trials=3)
    assert "train_calm fails with what params.yaml says" in failed.message
    refused = tuned(tree, Pipeline(), monkeypatch, budget=1.5)
    assert "budget 1.5; use 1 trial or more, and a budget above 0, at most 1" in refused.message


def test_a_trial_trains_its_model_alone() -> None:
    graph = read_graph(ROOT)
    for model, other in (("calm", "transformer"), ("transformer", "calm")):
        stages = graph.with_ancestors([MODELS[model].evaluation]).dependencies
        assert MODELS[model].training in stages
        assert MODELS[other].training not in stages
        assert {*MODELS[model].inputs} <= stages.keys()
    assert "train_autoencoder" not in graph.with_ancestors([MODELS["transformer"].evaluation]).dependencies


def test_metrics_are_those_of_the_stages() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for tuned_model in MODELS.values():
        (path,) = stages[tuned_model.evaluation]["metrics"]
        assert tuned_model.metric == f"{Path(path).stem}: brierlm"


@pytest.mark.slow
def test_the_pipeline_itself(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    clone(folder)
    before = (folder / "params.yaml").read_bytes()
    state = tune(trials=2, budget=0.5, folder=str(folder), return_state=True)
    assert state.is_completed(), state.message
    result = state.result()
    for model, full_steps in (("calm", 12), ("transformer", 10)):
        assert (result[model]["full_steps"], result[model]["steps"]) == (full_steps, full_steps // 2)
        assert [row["trial"] for row in result[model]["trials"]] == [0, 1]
        assert all(row["brierlm"] >= 0 for row in result[model]["trials"] + result[model]["in_full"])
    listed = run(folder, "dvc", "exp", "list", "--name-only").split()
    assert sorted(listed) == ["tune-calm-best", "tune-transformer-best"]
    assert (folder / "params.yaml").read_bytes() == before
    # In the tree nothing but what the trials share was made.
    assert (folder / "models/autoencoder").exists()
    assert not (folder / "models/calm").exists()
    assert not (folder / "models/transformer").exists()
    reference = run(folder, "git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/tune-transformer-best").strip()
    kept = yaml.safe_load(run(folder, "git", "show", f"{reference}:params.yaml"))
    best = {text.split("=")[0]: float(text.split("=")[1]) for text in result["transformer"]["best"]["overrides"]}
    assert {key: kept["transformer"][key.removeprefix("transformer.")] for key in best} == best
    assert kept["transformer"]["steps"] == "match"
    stages = yaml.safe_load(run(folder, "git", "show", f"{reference}:dvc.lock"))["stages"]
    assert "evaluate_transformer" in stages
    assert not {"train_calm", "train_autoencoder"} & stages.keys()
