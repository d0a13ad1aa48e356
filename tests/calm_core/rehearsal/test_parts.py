"""The parts of a rehearsal: which stages, which params, which tokenizer, and what a process took."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.training import calm_config
from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.presets import load_preset, preset_models
from calm_core.rehearsal.pipeline import stages_for
from calm_core.rehearsal.shrink import shrink
from calm_core.rehearsal.stage_process import run_stage
from calm_core.rehearsal.stand_in import stand_in_tokenizer
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer
from calm_core.transformer.training import transformer_config
from tests import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
DATA = ["check_params", "digest_corpus", "tokenise"]
CALM = [*DATA, "train_autoencoder", "encode_corpus", "train_calm"]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# A repetition under another seed, and a model beside the run's own, takes what its stage takes.
DECLARED = {name: stage for name, stage in STAGES.items() if not {"foreach", "matrix"} & stage.keys()}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["autoencoder"], [*DATA, "train_autoencoder"]),
        (["transformer"], [*DATA, "match_compute", "train_transformer"]),
        (["calm"], CALM),
        (["autoencoder", "calm"], CALM),
        (["calm", "transformer"], list(DECLARED)),
        ([], list(DECLARED)),
    ],
)
def test_stages_are_those_that_lead_to_the_models(models: list[str], expected: list[str]) -> None:
    found = stages_for(models)
    assert set(found) == set(expected)
    assert found == {name: f"python -m stages.{name}" for name in found}
    # dvc.yaml itself is written in an order in which its stages can run.
    made: set[str] = set()
    for name in found:
        outs = chain(*(DECLARED[name].get(kind, []) for kind in ("outs", "metrics")))
        made |= {next(iter(out)) if isinstance(out, dict) else out for out in outs}
        needs = [path for path in DECLARED[name]["deps"] if path.startswith(("data/", "models/", "results/"))]
        # A whole output or a part of one; a file of the CALM's folder; a folder of outputs.
        for path in needs:
            whole = {path, *map(str, Path(path).parents)} & made
            assert whole or path.startswith("models/calm/") or any(out.startswith(f"{path}/") for out in made)


def test_the_models_of_a_preset_are_those_whose_width_it_names() -> None:
    assert preset_models("calm-m") == {"autoencoder", "calm"}
    assert preset_models("transformer-s") == {"transformer"}
    assert preset_models("autoencoder") == {"autoencoder"}
    assert preset_models("smoke") == {"autoencoder", "calm", "transformer"}


def shapes(params: Params) -> tuple[Any, ...]:
    size = params.tokenizer.vocabulary_size
    coder = autoencoder_config(params.autoencoder, size)
    contexts = (params.calm.context_tokens, params.transformer.context_tokens)
    heads = (params.calm.samples, params.calm.target_samples, params.calm.decoder_score, params.calm.latents)
    return coder, calm_config(params.calm, coder), transformer_config(params.transformer, size), contexts, heads


@pytest.mark.parametrize("name", PRESETS)
def test_shrinking_keeps_every_shape(name: str) -> None:
    full = load_preset(name)
    small = shrink(full, 2, 100, "tokenizer.json").params
    assert shapes(small) == shapes(full)
    assert (small.autoencoder.steps, small.calm.steps, small.transformer.steps) == (2, 3, 3)
    assert (small.runtime.launcher, small.runtime.processes, small.runtime.gradient_accumulation) == ("none", 1, 1)
    # Published sequences are longer than what a batch holds at most, so there is one of them.
    for section, whole in ((small.calm, full.calm), (small.transformer, full.transformer)):
        assert 1 <= section.batch_sequences <= whole.batch_sequences
        assert section.batch_sequences * section.context_tokens <= max(2048, whole.context_tokens)
    assert small.autoencoder.batch_patches * full.autoencoder.patch_size <= 2048


def test_a_stand_in_has_as_many_entries_as_asked_for(tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "über łazy 狐"]
    tokenizer = stand_in_tokenizer(texts, 10_000)
    assert tokenizer.get_vocab_size() == 10_000
    assert sorted(tokenizer.get_vocab().values()) == list(range(10_000))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    end_of_text_id(loaded)
    for text in (*texts, "what it was not trained on: ♞ <unused-5000>"):
        token_ids = loaded.encode(text).ids
        assert loaded.decode(token_ids) == text
        # 256 bytes, two special tokens, and what the texts' few words can be merged to.
        assert max(token_ids) < 400
    assert stand_in_tokenizer(texts, 270).get_vocab_size() == 270


def test_a_process_is_measured(tmp_path: Path) -> None:
    for name, megabytes in (("small", 1), ("large", 301)):
        (tmp_path / f"{name}.py").write_text(f"print('at work')\nbytearray({megabytes} << 20)\n")
    # From a process without torch: Linux counts what the one that starts another has.
    code = """
from pathlib import Path
from calm_core.rehearsal.stage_process import run_stage
for name in ("small", "large"):
    print(run_stage(name, f"python -m {name}", Path("."), {}).peak_bytes)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    small, large = map(int, ended.stdout.split())
    assert large - small == pytest.approx(300 << 20, rel=0.05)
    assert ended.stderr == "  at work\n" * 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit('stage: out of memory; buy some')", "stage: out of memory; buy some"),
        ("print('at work'); 1 / 0", "stage failed with status 1: ZeroDivisionError: division by zero"),
        ("import os; print('at step 1', flush=True); os.kill(os.getpid(), 9)", "stage was killed by signal 9"),
    ],
)
def test_a_stage_that_fails_is_told_in_its_own_last_line(tmp_path: Path, code: str, told: str) -> None:
    (tmp_path / "stage.py").write_text(code)
    with pytest.raises(CalmError) as caught:
        run_stage("stage", "python -m stage", tmp_path, {})
    assert str(caught.value).startswith(told)
    assert "at step 1" in str(caught.value) or "signal" not in told
