"""`calm rehearse` as a whole: a quick pipeline of stand-ins for stages, and the real one at one layer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.cli import main
from calm_core.nn.backbone import BackboneConfig
from calm_core.rehearsal.stand_in import stand_in_tokenizer
from calm_core.storage.model_folder import save_model
from tests import ROOT

STAGE = """
import json
import sys
from pathlib import Path
import yaml

params = yaml.safe_load(Path("params.yaml").read_text())
assert not Path("models").exists()
{work}
Path("results").mkdir(exist_ok=True)
Path("results/timings.json").write_text(json.dumps({{"train_transformer": {{"seconds": 9.0, "step_seconds": 0.25}}}}))
print("train_transformer: done")
"""


@pytest.fixture()
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's root with params, presets and stages that do nothing but what a test writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "presets"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("calm_core", "stages", "models", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "stages/__init__.py").touch()
    pipeline = {"stages": {"train_transformer": {"cmd": "python -m stages.train_transformer"}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    return tmp_path


def set_stage(root: Path, work: str) -> None:
    (root / "stages/train_transformer.py").write_text(STAGE.format(work=work))


def calm(*arguments: str) -> int:
    sys.argv = ["calm", *arguments]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }


def test_figures_and_what_is_left_behind(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_stage(root, "assert params['transformer']['hidden_size'] == 768 and params['transformer']['steps'] == 7")
    before = files(root)
    assert calm("rehearse", "--preset", "transformer-s", "--steps", "7", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["stages"]
    # A step is one sequence of 2048 tokens in a quarter of a second; the full run has 250,000 of 1024 sequences.
    assert row["tokens_per_second"] == 4 * 2048
    assert row["full_run_hours"] == pytest.approx(250_000 * 1024 / 4 / 3600)
    assert printed["full_run_hours"] == row["full_run_hours"]
    assert row["peak_bytes"] > 1e6
    notes = "\n".join(printed["shrunk"])
    for told in (
        "documents of botocore's",
        "transformer: 7 steps of 250,000, each of 1 instead of 1,024 sequences",
        "a stand-in of 128,256 entries",
        "llama-3-tokenizer.json is missing",
    ):
        assert told in notes
    assert "calm:" not in notes
    # Data, models and results are as they were.
    assert files(root) - before == {".checkpoints/rehearsal.lock"}


def test_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_stage(root, "")
    assert calm("rehearse", "--preset", "transformer-s") == 0
    printed = capsys.readouterr()
    for told in ("train_transformer", "0.25", "8,192", "tokens/s", "740.7 days", "Shrunk: corpus"):
        assert told in printed.out, told
    assert "train_transformer (1 of 1)\n" in printed.err


def test_the_tokenizer_that_a_preset_names_is_used_where_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "llama-3-tokenizer.json").write_text("{}")
    set_stage(root, f"assert params['tokenizer']['path'] == {str(root / 'llama-3-tokenizer.json')!r}")
    assert calm("rehearse", "--preset", "transformer-s", "--json") == 0
    assert "stand-in" not in capsys.readouterr().out


def test_a_failing_stage_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_stage(root, "sys.exit('train_transformer: out of memory')")
    assert calm("rehearse", "--preset", "transformer-s") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "calm: train_transformer: out of memory"
    assert not (root / ".checkpoints/rehearsal").exists()


@pytest.mark.parametrize("arguments", [["--preset", "nothing"], ["--steps", "1"]])
def test_mistakes_run_nothing(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert calm("rehearse", *arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (root / ".checkpoints").exists()


def test_one_at_a_time_and_nothing_stays_behind_a_stopped_one(root: Path) -> None:
    # The stage tells that it runs, and waits for ever.
    set_stage(root, "print('at work'); sys.stdin.close(); import threading; threading.Event().wait()")
    command = [sys.executable, "-m", "calm_core.cli", "rehearse", "--preset", "transformer-s"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    while first.stderr.readline() != "  at work\n":
        assert first.poll() is None
    second = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("calm: another rehearsal is running here, in .checkpoints/rehearsal;")
    first.send_signal(signal.SIGTERM)
    # The pipe closes when the stage, which has it open too, is gone.
    assert "Traceback" not in first.stderr.read()
    assert first.wait() == 143
    assert not (root / ".checkpoints/rehearsal").exists()


SMALL = {"calm": {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 4, "key_value_heads": 4},
         "transformer": {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 4, "key_value_heads": 4},
         "autoencoder": {"hidden_size": 16, "intermediate_size": 24, "latent_size": 8}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "calm-m", "transformer-s", "smoke"])
def test_real_stages_at_one_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("params.yaml", "calm_core", "stages", "dvc.yaml"):
        (tmp_path / path).symlink_to(ROOT / path)
    overlay: dict[str, Any] = yaml.safe_load((ROOT / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
    for section, changes in SMALL.items():
        if "hidden_size" in overlay.get(section, {}):
            overlay[section] |= changes
    overlay["tokenizer"]["vocabulary_size"] = 5000
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/small.yaml").write_text(yaml.safe_dump(overlay))
    assert calm("rehearse", "--preset", "small", "--json") == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    trainings = {f"train_{model}" for model in SMALL if "hidden_size" in overlay.get(model, {})}
    assert {stage for stage, row in rows.items() if row["step_seconds"]} == trainings
    assert all(row["full_run_hours"] > 0 for stage, row in rows.items() if stage in trainings)
    assert ("report" in rows) == (name == "smoke")
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_real_stages_go_on_from_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("params.yaml", "calm_core", "stages", "dvc.yaml"):
        (tmp_path / path).symlink_to(ROOT / path)
    tokenizer = stand_in_tokenizer(["one two three"] * 9, 300)
    coder = AutoencoderConfig(300, 4, 16, 24, 8)
    model = Calm(CalmConfig(300, 4, 8, BackboneConfig(32, 48, 1, 4, 4), EnergyHeadConfig(1, 6)))
    for part, folder in ((model, tmp_path / "imported"), (Autoencoder(coder), tmp_path / "imported/autoencoder")):
        part.initialise(torch.Generator().manual_seed(1))
        save_model(part, tokenizer, folder)
    overlay: dict[str, Any] = {
        "tokenizer": {"path": "imported/tokenizer.json", "vocabulary_size": 300},
        "autoencoder": SMALL["autoencoder"],
        "calm": {**SMALL["calm"], "initial": "imported", "head": "energy", "head_blocks": 1, "noise_size": 6},
        "transformer": {"steps": 100},
        "evaluation": {"beside": []},
    }
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/small.yaml").write_text(yaml.safe_dump(overlay))
    assert calm("rehearse", "--preset", "small", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in told["stages"]}
    # The autoencoder is measured and not trained.
    assert rows["train_calm"]["full_run_hours"] == told["full_run_hours"] > 0
    assert rows["train_autoencoder"]["full_run_hours"] is None
    assert not [note for note in told["shrunk"] if note.startswith("autoencoder")]
    overlay["calm"]["layers"] = 2
    (tmp_path / "presets/small.yaml").write_text(yaml.safe_dump(overlay))
    assert calm("rehearse", "--preset", "small") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("`dvc exp run` -S calm.layers=1")
