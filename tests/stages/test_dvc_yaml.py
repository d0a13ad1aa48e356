"""dvc.yaml says exactly what each stage depends on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_core.params import Params
from tests.stages.imports import PACKAGES, ROOT, imported_files

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def test_all_stages_are_there() -> None:
    assert set(STAGES) == {
        "check_params",
        "tokenise",
        "train_autoencoder",
        "encode_corpus",
        "train_calm",
        "train_transformer",
        "evaluate_brierlm",
        "correlate_brierlm",
        "benchmark_flops",
        "model_cards",
        "report",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_imports(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"
    module = f"stages/{stage}.py"
    declared = {path for path in STAGES[stage]["deps"] if path.endswith(".py")}
    assert declared == imported_files(module) | {module}


def test_packages_hold_no_code_of_their_own() -> None:
    # Their __init__ is imported by every stage and declared by none.
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").read_text(encoding="utf-8").rstrip().endswith('"""')


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
        assert made & {path, *map(str, Path(path).parents)} or (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "calm_core").glob("*.py")))
def test_calm_core_knows_nothing_above_it(path: str) -> None:
    source = (ROOT / "calm_core" / path).read_text(encoding="utf-8")
    for package in ("dvc", "dvclive", "prefect", "stages", "flows"):
        assert f"import {package}" not in source
        assert f"from {package}" not in source


def test_models_know_no_files_and_no_devices() -> None:
    heads = ("head", "energy_head", "diffusion_head", "flow_head", "denoiser")
    objectives = ("energy_score", "diffusion", "flow_matching", "temperature", "brier")
    for name in ("autoencoder", "backbone", "calm", "transformer", "layers", *heads, *objectives):
        source = (ROOT / f"calm_core/{name}.py").read_text(encoding="utf-8")
        assert "cuda" not in source
        assert "Path" not in source


def test_imports_are_followed(tmp_path: Path) -> None:
    assert "calm_core/layers.py" in imported_files("stages/train_transformer.py")
    assert "calm_core/energy_head.py" not in imported_files("stages/train_transformer.py")
