"""`calm` with any arguments: it does what was asked, or says in one line why not, with status 2."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.cli import main
from calm_core.nn.backbone import BackboneConfig
from tests import ROOT, needs_linux
from tests.reliability.support.bad_input import TEXTS, assert_one_line, bounded, tries
from tests.support.tiny_models import TEXT, write_models


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml, presets, a text, a small CALM and a small Transformer."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "presets", folder / "presets")
    (folder / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "the"}) + "\n", encoding="utf-8")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\0")
    write_models(folder, BackboneConfig(8, 12, 1, 2, 1), context_tokens=12)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are too small to share."""
    monkeypatch.setattr("calm_core.runtime.precision.set_threads", lambda threads: None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word such as a/b may be a name on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of `calm` with ``arguments``, within bounds of time and memory."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    before = sys.argv
    sys.argv = ["calm", *arguments]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), bounded(1 << 30):
            main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.argv = before
    told = []
    for stream in streams:
        stream.flush()
        told.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return status, told[0], told[1]


def assert_told(*arguments: str) -> str | None:
    """Run `calm`; the line in which it refuses ``arguments``, None if it does not."""
    status, output, errors = run(*arguments)
    assert "Traceback" not in output + errors
    if status == 0:
        return None
    assert status == 2
    complaints = [line for line in errors.splitlines() if line.startswith("calm: ")]
    assert len(complaints) == 1
    assert errors.endswith(complaints[0] + "\n")
    assert_one_line(complaints[0])
    return complaints[0]


WORDS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff"), max_size=12
)
"""What a shell can pass on: any bytes but zeros; Python stands in lone surrogates for what is not UTF-8."""

NUMBERS = st.sampled_from(
    ["0", "1", "-1", "2", "3", "0.5", "1e-30", "1e300", "1e999", "nan", "inf", "-inf", "", "x", "2.5", "0x10", "١",
     str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000]
)  # fmt: skip
PATHS = st.sampled_from(
    ["calm", "transformer", "calm/autoencoder", "text.txt", "bytes.txt", "prompts.jsonl", "params.yaml", "presets",
     "nothing", ".", "..", "", "calm/../calm", "calm\nmodel", "x" * 300, "/" * 300, "[", "*", "**", "text.txt/x",
     "hf:", "hf::", "hf:a:b:c:d", "hf:calm", "hf:./nothing", "/dev/null", "/proc/self/mem", "ü", "\udcff"]
)  # fmt: skip
SMALL = ("1", "2", "3", "7", "12")
"""How much a run that is right may be asked for here."""

DEVICES = st.sampled_from(["auto", "cpu", "cuda", "mps", "", "x"])

OPTIONS = {
    "generate": {
        "--model": PATHS,
        "--prompt": WORDS,
        "--prompts": PATHS,
        "--tokens": NUMBERS.filter(lambda number: number != str(2**31)) | st.sampled_from(SMALL),
        "--temperature": NUMBERS,
        "--sampler": st.sampled_from(["batch", "exact", "softmax", "", "x"]),
        "--stop": WORDS,
        "--continuations": NUMBERS | st.sampled_from(SMALL),
        "--seed": NUMBERS,
        "--device": DEVICES,
        "--json": None,
    },
    "evaluate": {
        "--model": PATHS,
        "--corpus": PATHS,
        "--output": PATHS,
        "--text-field": WORDS,
        "--tokens": NUMBERS | st.sampled_from(SMALL),
        "--samples": NUMBERS.filter(lambda number: number != "1000"),
        "--context": NUMBERS | st.sampled_from(SMALL),
        "--every": NUMBERS,
        "--protocol": st.sampled_from(["own", "reference", "", "x"]),
        "--seed": NUMBERS,
        "--device": DEVICES,
        "--json": None,
    },
    "plan": {
        "--preset": st.sampled_from(["smoke", "smoke", "", "x", "../smoke"]),
        "--devices": NUMBERS,
        "--utilisation": NUMBERS,
        "--device-flops": NUMBERS,
        "--json": None,
    },
    "import-checkpoint": {"--tokenizer": PATHS, "--autoencoder": PATHS},
    "export-checkpoint": {},
    "publish": {"--private": None, "--dry-run": None},  # no model has a card, so that none gets as far as the network
    "preset": {},
    "check": {},
}
COMMANDS = {
    "generate": 0,
    "evaluate": 0,
    "plan": 0,
    "import-checkpoint": 2,
    "export-checkpoint": 2,
    "publish": 2,
    "preset": 1,
    "check": 0,
}


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> list[str]:
    """A command with some of its options, whose values are often right and often not, and some words too many."""
    arguments = [command]
    if command in ("generate", "evaluate") and draw(st.integers(0, 4)):
        arguments += ["--model", draw(st.sampled_from(["calm", "transformer"]))]
        arguments += ["--prompt", "the"] if command == "generate" else ["--corpus", "text.txt"]
        arguments += ["--tokens", "3"] if command == "generate" else ["--output", "out"]
    for name in draw(st.lists(st.sampled_from(sorted(OPTIONS[command])), max_size=3)) if OPTIONS[command] else []:
        values = OPTIONS[command][name]
        arguments += [name] if values is None else [name, draw(values)]
    arguments += draw(st.lists(PATHS | WORDS, min_size=COMMANDS[command], max_size=COMMANDS[command]))
    return arguments + draw(st.lists(WORDS, max_size=1) if not draw(st.integers(0, 5)) else st.just([]))


@pytest.mark.parametrize(("command", "examples"), [
    ("generate", 150), ("evaluate", 60), ("plan", 3), ("import-checkpoint", 100), ("export-checkpoint", 60),
    ("publish", 30), ("preset", 30), ("check", 20),
])  # fmt: skip
def test_any_options(
    command: str, examples: int, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, folder = content(workspace), tmp_path / "work"

    @tries(examples)
    @given(command_lines(command))
    def attempt(arguments: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(workspace, folder)
        monkeypatch.chdir(folder)
        refused = assert_told(*arguments)
        after = content(folder)
        if refused or command in ("generate", "plan", "check", "publish"):
            assert after == before
        if command != "preset":  # what was there is there
            assert before.items() <= after.items()

    attempt()


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_linux
def test_a_folder_of_results_may_have_any_name(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "work"))
    assert assert_told("evaluate", "--model", "calm", "--corpus", "text.txt", "--output", "\udcff") is None
    assert {path.name for path in Path("\udcff").iterdir()} == {"brierlm.json", "documents.parquet"}


HARMFUL = {
    "generate --model calm --prompt the --tokens 1000000000000000000000000000000": "'--tokens'",
    "generate --model calm --prompt the --seed 9223372036854775808": "'--seed'",
    "generate --model calm --prompt \udcff": "--prompt is not UTF-8 text",
    "generate --model calm --prompt the --stop \udcff": "--stop is not UTF-8 text",
    "generate --model calm --prompt the --continuations 1000000000": "'--continuations'",
    "generate --model calm --prompts /dev/zero": "has more than",
    "evaluate --model calm --corpus text.txt --samples 1000000000": "'--samples'",
    "evaluate --model transformer --corpus text.txt --every 1000000000000000000000": "'--every'",
    "evaluate --model transformer --corpus text.txt --every 13": "no place to ask after every 13 tokens",
    "evaluate --model calm --corpus text.txt --output .": "holds something else",
    "evaluate --model calm --corpus text.txt --output ..": "holds something else",
    "evaluate --model calm --corpus text.txt --output presets": "holds something else",
    "evaluate --model calm --corpus text.txt --output params.yaml": "holds something else",
    "import-checkpoint calm nothing/..": "exists; name a new folder",
    "preset ../../etc/passwd": "is unknown",
    "plan --preset ../params": "is unknown",
}


@pytest.mark.parametrize("line", HARMFUL)
def test_what_would_harm_is_refused(
    line: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "work"))
    before = content(tmp_path)
    assert HARMFUL[line] in (assert_told(*line.split()) or "")
    assert content(tmp_path) == before


def test_a_lack_of_memory_is_told(workspace: Path, tmp_path: Path) -> None:
    """The model asks for more than any machine has. A limit on the process would not do: other libraries' threads may
    be the first to meet it, and abort."""
    folder = shutil.copytree(workspace, tmp_path / "work")
    program = (
        "import torch, calm_core.cli, calm_core.transformer.model\n"
        "def hidden_states(*arguments):\n"
        "    return torch.zeros(1 << 50)\n"
        "calm_core.transformer.model.Transformer.hidden_states = hidden_states\n"
        "calm_core.cli.main()\n"
    )
    line = "evaluate --model transformer --corpus text.txt --context 120 --every 1"
    ended = subprocess.run(
        [sys.executable, "-c", program, *line.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "calm: out of memory; ask for less" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / "results").exists()


@tries(200)
@given(
    arguments=st.lists(
        WORDS | st.sampled_from(["--help", "--", "-h", "--model", "generate", "check", "plan"]), max_size=5
    )
)
def test_any_words(arguments: list[str], workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if arguments[:1] != ["plan"]:
        assert_told(*arguments)


@tries(150)
@given(content=st.binary(max_size=100) | TEXTS.map(str.encode), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_any_file_of_prompts(content: bytes, suffix: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    path = workspace / f"any{suffix}"
    path.write_bytes(content)
    try:
        assert_told("generate", "--model", "transformer", "--tokens", "1", "--json", "--prompts", path.name)
    finally:
        path.unlink()
