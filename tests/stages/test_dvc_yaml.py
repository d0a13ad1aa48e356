"""dvc.yaml says exactly what each stage depends on."""

from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from calm_core.params import Params
from tests import ROOT

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

REFUSING = {"calm_core/errors.py", "calm_core/nn/__init__.py", "calm_core/nn/limits.py", "calm_core/params.py"}
"""Code that every stage imports and none but check_params has to declare: it stops a run or changes nothing of it."""


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
    made = {
        next(iter(out)) if isinstance(out, dict) else out
        for other in STAGES.values()
        for kind in ("outs", "metrics")
        for out in other.get(kind, [])
    }
    for path in STAGES[stage]["deps"]:
        assert made & {path, *map(str, Path(path).parents)} or (ROOT / path).exists()
