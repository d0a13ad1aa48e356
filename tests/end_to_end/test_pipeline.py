"""The real pipeline at presets/smoke.yaml size, run by DVC in a temporary clone as a user would run it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.sampling import sampled

BIN = Path(sys.executable).parent
DECLARED: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = [name for name, stage in DECLARED.items() if not {"foreach", "matrix"} & stage.keys()]
BESIDE = [name for name in DECLARED if "beside_" in name]
REPETITIONS = [name for name in DECLARED if name not in (*STAGES, *BESIDE)]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def checked(folder: Path, *command: str) -> str:
    result = run(folder, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def clone(folder: Path) -> Path:
    """A git repository with the working tree's files, uncommitted changes included, at smoke size."""
    listed = checked(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in listed.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    checked(folder, "git", "init", "--quiet")
    checked(folder, "calm", "preset", "smoke")
    checked(folder, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    dates = ("--date=2026-01-01T00:00:00Z",)
    # One revision for both clones: the report names it.
    checked(
        folder,
        "env",
        "GIT_COMMITTER_DATE=2026-01-01T00:00:00Z",
        "git",
        *identity,
        "commit",
        "--quiet",
        "--message",
        "clone",
        *dates,
    )
    return folder


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([\w@.-]+)'", output))


def fingerprint(folder: Path) -> dict[str, str]:
    """Content of all that the pipeline made, the machine's timings left out."""
    files = [path for part in ("data", "models", "results") for path in sorted((folder / part).rglob("*"))]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.stem != "timings"
    }


def change(folder: Path, section: str, key: str, value: Any) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run once."""
    folder = clone(tmp_path_factory.mktemp("first"))
    assert ran(checked(folder, "dvc", "repro")) == set(STAGES)
    return folder


@pytest.fixture()
def unchanged(finished: Path) -> Iterator[Path]:
    """The finished clone, for runs that change no output; its params are put back afterwards."""
    yield finished
    checked(finished, "git", "checkout", "--quiet", "params.yaml")


@pytest.fixture()
def workspace(finished: Path) -> Iterator[Path]:
    """The finished clone; its params and outputs are put back afterwards."""
    yield finished
    checked(finished, "git", "checkout", "--quiet", "params.yaml")
    checked(finished, "dvc", "repro")


def test_results_keep_their_contract(finished: Path) -> None:
    results = {
        name: json.loads((finished / f"results/{name}.json").read_text())
        for name in ("autoencoder", "brierlm", "flops", "correlation/run", "diversity")
    }
    assert {"token_accuracy", "token_accuracy_noisy", "parameters"} <= results["autoencoder"].keys()
    for model in ("calm", "transformer"):
        score = results["brierlm"][model]
        assert len(score["brier"]) == 4
        low, high = score["brierlm_ci95"]
        assert 0 <= low <= score["brierlm"] <= high
        assert score["positions"] > 0
        row = {"parameters", "training_flops", "inference_flops_per_token"}
        assert row | {"measured_inference_flops_per_token"} <= results["flops"]["run"][model].keys()
    assert results["brierlm"]["transformer"]["cross_entropy_nats"] > 0
    published = results["flops"]["published"]
    assert row <= published["transformer_s"].keys() & published["calm_m"].keys()
    assert {"training_saving", "inference_saving"} <= published.keys()
    steps = {"transformer": [2, 5, 7, 10], "calm": [3, 6, 9, 12]}
    for model, measure in (("transformer", "cross_entropy_nats"), ("calm", "nats_per_token")):
        along = results["correlation/run"][model]
        assert {"pearson", "spearman"} <= along.keys()
        assert [row["step"] for row in along["checkpoints"]] == steps[model]
        assert along["checkpoints"][-1][measure] < along["checkpoints"][0][measure]
        score = results["brierlm"][model]
        assert score["nats_per_token"] > 0
        assert score["bits_per_byte"] > 0
        assert len(score["by_position"]) == 8
        assert [row["context_tokens"] for row in score["by_context"]] == [16, 32, 64]
    assert "likelihood_bound" not in results["brierlm"]["calm"]
    assert results["flops"]["run"]["calm"]["training_flops_with_autoencoder"] == pytest.approx(
        results["flops"]["run"]["calm"]["training_flops"]
    )
    diversity = results["diversity"]
    for model in ("calm", "transformer"):
        assert list(diversity[model]) == ["1.0", "0.5"]
        for row in (diversity["truth"], *diversity[model].values()):
            assert len(row["distinct"]) == len(row["distinct_standard_error"]) == 4
            assert 0 <= row["copied"] <= 1
        for row in diversity[model].values():
            assert len(row["accuracy"]) == len(row["collision"]) == 4
            assert row["brierlm_ci95"][0] <= row["brierlm"] <= row["brierlm_ci95"][1]
    timings = json.loads((finished / "results/timings.json").read_text())
    assert set(timings) == set(STAGES)
    assert timings["train_autoencoder"]["seconds"] > 0


def test_nothing_to_do_the_second_time(finished: Path) -> None:
    assert ran(checked(finished, "dvc", "repro")) == {"digest_corpus"}  # which looks whether there is


@pytest.mark.slow
def test_two_clean_clones_agree_to_the_byte(finished: Path, tmp_path: Path) -> None:
    other = clone(tmp_path)
    checked(other, "dvc", "repro")
    assert fingerprint(other) == fingerprint(finished)
    assert (other / "dvc.lock").read_bytes() == (finished / "dvc.lock").read_bytes()


@pytest.mark.slow
def test_evaluation_params_train_nothing(workspace: Path) -> None:
    change(workspace, "evaluation", "bootstrap_resamples", 150)
    stages = ran(checked(workspace, "dvc", "repro"))
    # The cards follow only if an interval moved, which it does not between scores of 0.
    assert stages - {"model_cards"} == {
        "check_params", "digest_corpus", "evaluate_calm", "evaluate_transformer", "evaluate_brierlm",
        "correlate_brierlm", "measure_diversity", "report"
    }  # fmt: skip


@pytest.mark.slow
def test_calm_params_leave_the_others_alone(workspace: Path) -> None:
    before = fingerprint(workspace)
    change(workspace, "calm", "learning_rate", 0.004)
    stages = ran(checked(workspace, "dvc", "repro"))
    evaluated = {
        "evaluate_calm", "evaluate_brierlm", "correlate_brierlm", "measure_diversity", "benchmark_flops", "model_cards",
        "report"
    }  # fmt: skip
    assert stages == {"check_params", "digest_corpus", "match_compute", "train_calm", *evaluated}
    after = fingerprint(workspace)
    changed = {path for path in before if before[path] != after[path]}
    assert "models/calm/model.safetensors" in changed
    assert not any(path.startswith(("data/", "models/autoencoder", "models/transformer")) for path in changed)


@pytest.mark.slow
def test_another_compute_of_calm_trains_the_transformer_anew_and_nothing_else_of_calm_does(workspace: Path) -> None:
    def ran_after(section: str, key: str, value: Any) -> set[str]:
        change(workspace, section, key, value)
        return ran(checked(workspace, "dvc", "repro", "train_transformer"))

    asked = {"check_params", "digest_corpus", "match_compute"}
    assert ran_after("calm", "muon_learning_rate", 0.01) == asked
    assert ran_after("calm", "steps", 24) == {*asked, "train_transformer"}
    assert json.loads((workspace / "data/transformer_steps.json").read_text()) == {"steps": 21}
    assert ran_after("transformer", "steps", 30) == {*asked, "train_transformer"}
    assert ran_after("calm", "steps", 36) == asked
    assert json.loads((workspace / "data/transformer_steps.json").read_text()) == {"steps": 30}


@pytest.mark.slow
def test_another_seed_repeats_the_trainings_and_nothing_else(workspace: Path) -> None:
    before = fingerprint(workspace)
    change(workspace, "evaluation", "seeds", [7])
    stages = ran(checked(workspace, "dvc", "repro"))
    repeated = {f"{name}@7" for name in REPETITIONS}
    # The cards follow if the scores moved, which of models that know nothing they may not.
    assert stages - {"model_cards"} == {"check_params", "digest_corpus", *repeated, "evaluate_brierlm", "report"}
    after = fingerprint(workspace)
    changed = {path for path in before if before[path] != after[path]}
    assert not any(path.startswith(("data/tokens", "data/latents")) or path.endswith("tensors") for path in changed)
    for model in ("autoencoder", "calm", "transformer"):
        weights = [workspace / root / f"models/{model}/model.safetensors" for root in ("", "repeats/7")]
        assert weights[0].stat().st_size == weights[1].stat().st_size
        assert weights[0].read_bytes() != weights[1].read_bytes()
    results = json.loads((workspace / "results/brierlm.json").read_text())
    assert results["calm"]["seeds"] == [0, 7]
    # The repetition is what the run would be under that seed.
    other = yaml.safe_load((workspace / "params.yaml").read_text())
    other["seed"], other["evaluation"]["seeds"] = 7, []
    (workspace / "params.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    checked(workspace, "dvc", "repro")
    for name in ("models/calm/model.safetensors", "models/transformer/model.safetensors", "data/latents"):
        run_itself, repetition = workspace / name, workspace / "repeats/7" / name
        files = [path for path in sorted(repetition.rglob("*")) if path.is_file()] or [repetition]
        for path in files:
            twin = run_itself / path.relative_to(repetition)
            assert path.read_bytes() == twin.read_bytes()
    # DVC leaves what no stage makes any more.
    shutil.rmtree(workspace / "repeats")
    for path in (workspace / "results/scores").glob("*-seed-7.*"):
        path.unlink()


@pytest.mark.slow
def test_a_model_beside_is_trained_and_compared_and_nothing_else_is(workspace: Path) -> None:
    before = fingerprint(workspace)
    (workspace / "presets/slower.yaml").write_text("calm:\n  learning_rate: 0.002\n")
    change(workspace, "evaluation", "beside", ["slower"])
    stages = ran(checked(workspace, "dvc", "repro"))
    beside = {"beside_train_calm@slower", "beside_evaluate_calm@slower"}
    evaluated = {"evaluate_brierlm", "benchmark_flops", "report"}
    # All is as it was but for what names the model beside: the cards do not.
    assert stages - {"model_cards"} == {"check_params", "digest_corpus", *beside, *evaluated}
    after = fingerprint(workspace)
    results = {f"results/{name}" for name in ("brierlm.json", "flops.json", "report.html")}
    assert {path for path in before if before[path] != after[path]} == results
    scores = {f"results/scores/calm-slower.{suffix}" for suffix in ("json", "parquet")}
    assert after.keys() - before.keys() == {"data/beside/slower.json", *scores}
    found = json.loads((workspace / "results/brierlm.json").read_text())["beside"]["slower"]
    assert {"brierlm", "bits_per_byte", "minus_transformer"} <= found.keys()
    assert "CALM, slower" in (workspace / "results/report.html").read_text()
    # Under another seed as well, and anew as the preset changes.
    change(workspace, "evaluation", "seeds", [7])
    stages = ran(checked(workspace, "dvc", "repro"))
    assert {f"repeat_{name}-7" for name in beside} <= stages
    assert not stages & beside
    (workspace / "presets/slower.yaml").write_text("calm:\n  learning_rate: 0.001\n")
    stages = ran(checked(workspace, "dvc", "repro"))
    again = {"check_params", "digest_corpus", *beside, *(f"repeat_{name}-7" for name in beside)}
    assert stages - {"model_cards", *evaluated} == again
    # One that cannot be beside is told before anything is trained.
    (workspace / "presets/slower.yaml").write_text("seed: 1\n")
    failed = run(workspace, "dvc", "repro")
    assert failed.returncode != 0
    assert "check_params: preset slower changes seed" in failed.stdout + failed.stderr
    assert ran(failed.stdout + failed.stderr) == {"check_params"}
    (workspace / "presets/slower.yaml").unlink()
    # DVC leaves what no stage makes any more.
    for folder in ("repeats", "beside"):
        shutil.rmtree(workspace / folder)
    for pattern in ("*-seed-7.*", "calm-slower.*"):
        for path in (workspace / "results/scores").glob(pattern):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("head", "fed_back"), [("energy", "tokens"), ("diffusion", "latents"), ("flow", "tokens")])
def test_every_head_trains_and_is_evaluated(workspace: Path, head: str, fed_back: str) -> None:
    for key, value in (("head", head), ("input", fed_back), ("diffusion_steps", 5), ("flow_steps", 2)):
        change(workspace, "calm", key, value)
    stages = ran(checked(workspace, "dvc", "repro"))
    assert {"train_calm", "match_compute", "evaluate_brierlm", "measure_diversity", "report"} <= stages
    assert not stages & {"tokenise", "train_autoencoder", "encode_corpus"}
    # The baseline has as many steps as match this head; DVC has it in its cache if those of another head are as many.
    steps = json.loads((workspace / "data/transformer_steps.json").read_text())["steps"]
    assert (workspace / f"models/transformer_checkpoints/step-{steps:07}").is_dir()
    assert json.loads((workspace / "models/calm/config.json").read_text())["head"]["kind"] == head
    found = json.loads((workspace / "results/brierlm.json").read_text())["calm"]
    bounds = [row["nats_per_token"] for row in found["likelihood_bound"]]
    assert len(bounds) == 16
    assert all(bounds[n] > bounds[n + 1] for n in range(16) if n % 4 < 3)
    flops = json.loads((workspace / "results/flops.json").read_text())["run"]["calm"]
    assert flops["measured_inference_flops_per_token"] == pytest.approx(flops["inference_flops_per_token"], rel=0.02)
    assert "variational bound" in (workspace / "results/report.html").read_text() or head != "diffusion"
    assert "Error" not in checked(workspace, "dvc", "plots", "show")


def test_models_are_used_as_the_documentation_says(finished: Path) -> None:
    card = (finished / "models/calm/README.md").read_text()
    assert "botocore" in card
    assert "brierlm_ci95" in card
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    assert len(examples) == 4
    program = "\n".join([*examples, *re.findall(r"```python\n(.*?)```", card, re.DOTALL)])
    printed = checked(finished, sys.executable, "-c", program)
    assert "of the tokens come back" in printed
    assert "fidelity" in printed


def test_the_command_line_uses_what_the_pipeline_made(finished: Path) -> None:
    for model in ("calm", "transformer"):
        written = checked(
            finished, "calm", "generate", "--model", f"models/{model}", "--prompt", "The", "--tokens", "9"
        )
        assert written.startswith("The")
    checked(finished, "calm", "evaluate", "--model", "models/transformer", "--corpus", "data/tokens", "--samples", "2",
            "--tokens", "4000", "--output", "evaluated")  # fmt: skip
    alone = json.loads((finished / "evaluated/brierlm.json").read_text())
    in_pipeline = json.loads((finished / "results/brierlm.json").read_text())["transformer"]
    assert alone["positions"] == in_pipeline["positions"]
    assert alone["cross_entropy_nats"] == pytest.approx(in_pipeline["cross_entropy_nats"], rel=1e-5)
    planned = json.loads(checked(finished, "calm", "plan", "--devices", "2", "--json"))
    flops = json.loads((finished / "results/flops.json").read_text())["run"]["calm"]
    assert planned["calm"]["training_flops"] == flops["training_flops"]
    shutil.rmtree(finished / "evaluated")


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("calm", "widht", 64, "calm.widht is unknown; allowed here: steps, warmup_steps"),
        ("calm", "steps", "many", "calm.steps is 'many': input should be a valid integer"),
        ("autoencoder", "patch_size", 3, "autoencoder.patch_size 3 does not divide calm.context_tokens 64"),
        ("transformer", "heads", 5, "heads 5 does not divide hidden_size 32"),
        ("report", "temperature", 1.5, "report.temperature is 1.5: input should be less than or equal to 1"),
    ],
)
def test_wrong_params_stop_before_any_work(unchanged: Path, section: str, key: str, value: Any, told: str) -> None:
    before = fingerprint(unchanged)
    change(unchanged, section, key, value)
    result = run(unchanged, "dvc", "repro")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert told in output
    assert "Traceback" not in output
    assert ran(output) == {"check_params"}
    assert fingerprint(unchanged) == before


NOT_UTF8 = ("latin1.txt", b"caf\xe9", "latin1.txt is not UTF-8 text (byte 3, 0xe9 in line 1)")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    sampled(
        [
            ("empty.txt", b"", "the corpus holds no text"),
            NOT_UTF8,
            ("missing.txt", None, "missing.txt matches no file"),
            ("short.txt", b"one document alone", "falls into the"),
        ],
        NOT_UTF8,
    ),
)
def test_a_bad_corpus_leaves_earlier_outputs(unchanged: Path, name: str, content: bytes | None, told: str) -> None:
    before = fingerprint(unchanged)
    if content is not None:
        (unchanged / name).write_bytes(content)
    change(unchanged, "corpus", "source", "files")
    change(unchanged, "corpus", "paths", [name])
    result = run(unchanged, "dvc", "repro")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert told in output
    assert "Traceback" not in output
    # All but the digest, which is that of the bad corpus now.
    assert {**fingerprint(unchanged), "data/corpus.json": before["data/corpus.json"]} == before
