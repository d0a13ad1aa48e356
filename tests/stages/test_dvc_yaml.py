"""dvc.yaml says exactly what each stage depends on."""

from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from calm_core.params import Params
from tests import ROOT

ALL: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
MADE_MANY_OF = {name: stage.get("do", stage) for name, stage in ALL.items() if {"foreach", "matrix"} & stage.keys()}
STAGES = {name: stage for name, stage in ALL.items() if name not in MADE_MANY_OF}
BESIDE = {name: stage for name, stage in MADE_MANY_OF.items() if "beside_" in name}
REPETITIONS = {name: stage for name, stage in MADE_MANY_OF.items() if name not in BESIDE}

REFUSING = {"calm_core/errors.py", "calm_core/nn/__init__.py", "calm_core/nn/limits.py", "calm_core/params.py"}
"""Code that every stage imports and none but check_params has to declare: it stops a run or changes nothing of it."""

SHARED = ("data/tokens", "data/groups.parquet", "data/transformer_steps.json",
          *(f"data/initial/{model}.json" for model in ("autoencoder", "calm", "transformer")))  # fmt: skip
"""What the stages of all seeds read."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("calm_core", "stages", cache_dir=None)


def imported_files(graph: grimp.ImportGraph, stage: str) -> set[str]:
    """All files of ours that a stage's module needs, itself included."""
    modules = graph.find_upstream_modules(f"stages.{stage}") | {f"stages.{stage}"}
    paths = [Path(*module.split(".")) for module in modules]
    return {str(path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")) for path in paths}


def code(stage: str) -> list[str]:
    """The files and folders of code that dvc.yaml declares."""
    return [path for path in STAGES[stage]["deps"] if path.startswith(("calm_core", "stages"))]


def outputs(stage: dict[str, Any]) -> list[str]:
    """What a stage writes."""
    entries = [*stage.get("outs", []), *stage.get("metrics", [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def of_seed(path: str) -> str:
    """Where the repetition of a stage has what the stage has at ``path``."""
    if path.startswith("results/scores/"):
        return "-seed-${item}.".join(path.split("."))
    if path.startswith("results/correlation/"):
        return path.replace("run.json", "seed-${item}.json")
    return path if path in SHARED else f"repeats/${{item}}/{path}"


def of_preset(path: str, preset: str, seed: str) -> str:
    """Where a stage of the CALM of a preset has what the run's own has at ``path``; ``seed`` is empty or a further one.

    The autoencoder and what it made of the text are those of the seed.
    """
    own = path.startswith(("models/calm", "results/training/calm", "results/scores/"))
    if not own:
        return of_seed(path).replace("${item}", seed) if seed else path
    if path.startswith("results/scores/"):
        ending = f"-{preset}-seed-{seed}." if seed else f"-{preset}."
        return ending.join(path.split("."))
    return f"beside/{preset}/{seed}/{path}" if seed else f"beside/{preset}/{path}"


def covers(declared: str, path: str) -> bool:
    return path == declared or path.startswith(f"{declared}/")


def test_all_stages_are_there() -> None:
    modules = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert set(STAGES) == modules
    assert all(STAGES[stage]["cmd"] == f"python -m stages.{stage}" for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_import_is_declared(graph: grimp.ImportGraph, stage: str) -> None:
    undeclared = {
        path for path in imported_files(graph, stage) if not any(covers(declared, path) for declared in code(stage))
    }
    assert undeclared <= REFUSING


@pytest.mark.parametrize("stage", STAGES)
def test_every_declared_path_is_imported(graph: grimp.ImportGraph, stage: str) -> None:
    imported = imported_files(graph, stage)
    assert [declared for declared in code(stage) if not any(covers(declared, path) for path in imported)] == []
    assert len(set(code(stage))) == len(code(stage))


@pytest.mark.parametrize(
    ("edited", "unconcerned"),
    [
        ("calm_core/calm/energy_head.py", {"tokenise", "train_autoencoder", "encode_corpus", "train_transformer"}),
        ("calm_core/transformer/model.py", {"tokenise", "train_autoencoder", "encode_corpus", "train_calm"}),
        ("calm_core/nn/backbone.py", {"tokenise", "train_autoencoder", "encode_corpus"}),
        ("calm_core/evaluation/brier.py", {"train_autoencoder", "train_calm", "train_transformer"}),
        ("calm_core/params.py", {"tokenise", "train_autoencoder", "train_calm", "train_transformer"}),
    ],
)
def test_an_edit_makes_stale_what_it_concerns_and_no_more(edited: str, unconcerned: set[str]) -> None:
    assert (ROOT / edited).is_file()
    stale = {stage for stage in STAGES if any(covers(declared, edited) for declared in code(stage))}
    assert stale
    assert not stale & unconcerned


def test_params_refuse_and_change_nothing() -> None:
    # A default would be a value that params.yaml does not show, and params.py is no dependency of the trainings.
    for section in (Params, *(field.annotation for field in Params.model_fields.values())):
        fields = getattr(section, "model_fields", {})
        assert [name for name, field in fields.items() if not field.is_required()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "calm_core").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_packages_hold_no_code_of_their_own(path: Path) -> None:
    # Importing any module runs them, and a stage that declares single files of a folder does not declare them.
    assert path.read_text(encoding="utf-8").rstrip().endswith('"""')


@pytest.mark.parametrize("stage", STAGES)
def test_params_exist(stage: str) -> None:
    for key in STAGES[stage].get("params", []):
        if isinstance(key, str):
            section, _, name = key.partition(".")
            annotation = Params.model_fields[section].annotation
            assert not name or name in annotation.model_fields  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", STAGES)
def test_every_input_is_an_output_of_another_stage_or_in_git(stage: str) -> None:
    made = {out for other in STAGES.values() for out in outputs(other)}
    # An output, a folder of one, a folder inside one, or a file of ours.
    for path in STAGES[stage]["deps"]:
        inside = any(covers(path, out) for out in made)
        assert inside or made & set(map(str, Path(path).parents)) or (ROOT / path).exists()


@pytest.mark.parametrize("name", REPETITIONS)
def test_a_repetition_is_its_stage_under_another_seed(name: str) -> None:
    repetition, original = REPETITIONS[name], name.removeprefix("repeat_")
    stage = STAGES[original]
    assert ALL[name]["foreach"] == "${evaluation.seeds}"
    assert repetition["cmd"] == f"{stage['cmd']} --seed ${{item}}"
    # What names its seed is the command: the run's own changes nothing of it.
    assert repetition["params"] == [param for param in stage["params"] if param != "seed"]
    declared = {path for path in repetition["deps"] if path.startswith(("calm_core", "stages"))}
    assert declared == set(code(original))
    for read in set(stage["deps"]) - declared:
        assert any(covers(path, of_seed(read)) for path in repetition["deps"]), read
    for written in outputs(stage):
        assert any(covers(path, of_seed(written)) for path in outputs(repetition)), written


@pytest.mark.parametrize("name", BESIDE)
def test_a_model_beside_is_its_stage_under_a_preset_and_perhaps_another_seed(name: str) -> None:
    beside, original = BESIDE[name], name.removeprefix("repeat_").removeprefix("beside_")
    stage = STAGES[original]
    if name.startswith("repeat_"):
        preset, seed, asked = "${item.preset}", "${item.seed}", " --seed ${item.seed} --preset ${item.preset}"
        assert ALL[name]["matrix"] == {"preset": "${evaluation.beside}", "seed": "${evaluation.seeds}"}
    else:
        preset, seed, asked = "${item}", "", " --preset ${item}"
        assert ALL[name]["foreach"] == "${evaluation.beside}"
    assert beside["cmd"] == stage["cmd"] + asked
    # Section calm is that of the preset, whatever the run's own says.
    of_run = [param for param in stage["params"] if not param.startswith("calm")]
    assert beside["params"] == [param for param in of_run if not (seed and param == "seed")]
    declared = {path for path in beside["deps"] if path.startswith(("calm_core", "stages"))}
    assert declared == set(code(original))
    section = f"data/beside/{preset}.json"
    reads = {path for path in stage["deps"] if not path.startswith(("calm_core", "stages"))}
    found = [path for path in beside["deps"] if path not in declared]
    wanted = {section, *(of_preset(path, preset, seed) for path in reads)}
    assert all(any(covers(path, one) for path in found) for one in wanted)
    assert all(any(covers(path, one) for one in wanted) for path in found)
    # Checkpoints along the training are the run's own alone.
    written = {of_preset(path, preset, seed) for path in outputs(stage) if path != "models/calm_checkpoints"}
    assert all(any(covers(path, one) for path in outputs(beside)) for one in written)
    assert all(any(covers(path, one) for one in written) for path in outputs(beside))


def test_sections_of_presets_are_made_anew_when_a_preset_changes() -> None:
    assert {"presets", "params.yaml"} <= set(STAGES["check_params"]["deps"])
    assert "data/beside" in STAGES["benchmark_flops"]["deps"]


def test_what_is_trained_and_compared_is_repeated() -> None:
    made = (".safetensors", "results/scores/", "data/latents")
    trained = {name for name, stage in STAGES.items() if any(part in out for out in outputs(stage) for part in made)}
    assert {f"repeat_{name}" for name in trained} <= REPETITIONS.keys()
    beside = {f"beside_{name}" for name in ("train_calm", "evaluate_calm")}
    assert BESIDE.keys() == beside | {f"repeat_{name}" for name in beside}
