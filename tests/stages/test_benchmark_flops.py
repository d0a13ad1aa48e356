"""What results/flops.json says of a CALM beside the run's own, and of one that went on."""

from pathlib import Path
from typing import Any

import pytest

from calm_core.params import Params
from calm_core.presets import apply_preset, load_preset
from calm_core.storage.json_io import read_json
from flows.workspaces import apply_overrides
from stages import benchmark_flops, check_params
from tests import ROOT

WIDER = """\
calm:
  hidden_size: 48
  heads: 4
  head_blocks: 2
  samples: 3
  decoder_score: false
  steps: 24
"""


@pytest.fixture(params=["tokens", "energy"])
def smoke(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params of a project in the current folder, under each head, which has two presets; no speed is measured."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "presets/smoke.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    apply_preset("smoke")
    apply_overrides(Path("params.yaml"), [f"calm.head={request.param}"])
    Path("presets/wider.yaml").write_text(WIDER, encoding="utf-8")
    Path("presets/longer.yaml").write_text("calm:\n  steps: 36\n", encoding="utf-8")
    Path("results").mkdir()
    monkeypatch.setattr(benchmark_flops, "tokens_per_second", lambda *arguments: {})
    return load_preset("smoke")


def counted(params: Params, *beside: str) -> dict[str, Any]:
    evaluation = params.evaluation.model_copy(update={"beside": list(beside)})
    params = params.model_copy(update={"evaluation": evaluation})
    check_params.main(params)
    benchmark_flops.main(params)
    found: dict[str, Any] = read_json(Path("results/flops.json"))["run"]
    return found


def test_a_model_beside_is_counted_as_a_run_of_its_own_would_be(smoke: Params) -> None:
    alone, beside = counted(smoke), counted(smoke, "wider", "longer")
    assert alone["beside"] == {}
    assert list(beside["beside"]) == ["wider", "longer"]
    # The run's own figures, the baseline's matched steps among them, are those without it.
    assert {**beside, "beside": {}} == alone
    for preset in ("wider", "longer"):
        own = counted(load_preset(preset))["calm"]
        assert beside["beside"][preset] == own != alone["calm"]


def test_a_model_beside_that_trains_three_times_as_long_takes_three_times_the_flops(smoke: Params) -> None:
    run = counted(smoke, "longer")
    own, longer, autoencoder = run["calm"], run["beside"]["longer"], run["autoencoder"]["training_flops"]
    assert longer["training_flops"] == pytest.approx(3 * own["training_flops"])
    assert longer["counted_training_flops"] == pytest.approx(3 * own["counted_training_flops"])
    charged = autoencoder if smoke.calm.head == "energy" else 0
    assert longer["training_flops_with_autoencoder"] == pytest.approx(3 * own["training_flops"] + charged)
    assert longer["inference_flops_per_token"] == own["inference_flops_per_token"]


def test_an_autoencoder_that_came_with_the_model_was_not_trained(smoke: Params) -> None:
    given = smoke.model_copy(update={"calm": smoke.calm.model_copy(update={"initial": "a folder"})})
    own, run = counted(smoke), counted(given)
    if smoke.calm.head == "tokens":
        assert run == own
        return
    for key in ("steps", "training_tokens", "training_flops", "counted_training_flops"):
        assert run["autoencoder"][key] == 0 < own["autoencoder"][key]
    for key in ("training_flops", "counted_training_flops"):
        assert run["calm"][f"{key}_with_autoencoder"] == run["calm"][key] == own["calm"][key]
