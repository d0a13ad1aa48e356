"""The `calm` command as its users meet it: output, files, and every mistake as one line and status 2."""

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from calm_core.cli import _model_slug, main
from calm_core.inference.language_model import load_language_model
from tests import ROOT
from tests.calm_core.reference.reference_data import reference_weights, write_reference
from tests.support.pretend_device import pretend_device
from tests.support.tiny_models import TEXT, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random CALM (K = 3) and Transformer."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def workspace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The best device is then the CPU, on which the tests compute themselves.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{TEXT * 5}{n}"}) + "\n" for n in range(6)))


def run(*arguments: str) -> int:
    sys.argv = ["calm", *arguments]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith(("corpus: ", "tokenise", "BrierLM"))]
    assert len(lines) == 1
    assert lines[0].startswith("calm: ")
    return lines[0]


@pytest.mark.parametrize("model", ["calm", "transformer"])
def test_one_prompt_streams_what_generate_returns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--model", f"models/{model}", "--prompt", "the qu", "--tokens", "20", "--seed", "3")
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    (written,) = load_language_model(f"models/{model}").generate(["the qu"], tokens=20, seed=3)
    assert printed == f"the qu{written}\n"
    assert run(*arguments) == 0
    assert capsys.readouterr().out == printed


def test_prompts_of_a_file_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["the", "", "a longer prompt than the others", "ü"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ("--model", "models/calm", "--tokens", "7", "--temperature", "0.5", "--json")
    outputs = []
    for file in ("prompts.txt", "prompts.jsonl"):
        assert run("generate", "--prompts", file, *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["finish_reason"] in ("length", "end_of_text") and row["tokens"] <= 7 for row in rows)
    assert all(row["draws"] >= 200 for row in rows)


def test_many_prompts_go_in_batches_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("the\n" * 20)
    assert run("generate", "--model", "models/transformer", "--prompts", "prompts.txt", "--tokens", "5", "--json") == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert len(texts) == 20
    assert texts[:4] != texts[16:]


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert run("generate", "--model", "models/transformer", "--tokens", "30", "--json", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_text_ends_at_a_stop_text(capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = generated(capsys, "--prompt", "the")
    text = str(whole["text"])
    stops = ("--stop", text[6:9], "--stop", text[3:5], "--stop", "never there")
    (cut,) = generated(capsys, "--prompt", "the", *stops)
    assert cut["text"] == text[: min(text.find(text[6:9]), text.find(text[3:5]))]
    assert cut["finish_reason"] == "stop"
    assert cut.keys() == whole.keys() | {"stop"}
    assert cut["stop"] == [text[6:9], text[3:5], "never there"]
    assert run("generate", "--model", "models/transformer", "--tokens", "30", "--prompt", "the", *stops) == 0
    assert capsys.readouterr().out == f"the{cut['text']}\n"
    assert "a stop text is empty" in mistake(capsys, "generate", "--model", "nothing", "--prompt", "a", "--stop", "")


def test_several_texts_of_each_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("the\nquick\n")
    plain = generated(capsys, "--prompts", "prompts.txt")
    rows = generated(capsys, "--prompts", "prompts.txt", "--continuations", "3")
    assert [(row["prompt"], row["continuation"]) for row in rows] == [
        (p, n) for p in ("the", "quick") for n in range(3)
    ]
    assert len({str(row["text"]) for row in rows}) == 6
    for first, row in zip(rows[::3], plain, strict=True):
        assert "continuation" not in row
        assert first == {**row, "continuation": 0}
    (one,) = generated(capsys, "--prompt", "the", "--continuations", "1")
    assert one == rows[0]
    assert (
        run("generate", "--model", "models/transformer", "--tokens", "30", "--prompt", "the", "--continuations", "2")
        == 0
    )
    assert capsys.readouterr().out == "".join(f"the{row['text']}\n\n" for row in rows[:2])


@pytest.mark.parametrize("options", [(), ("--json",), ("--continuations", "2")])
def test_the_speed_is_told_on_standard_error(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", "--model", "models/transformer", "--prompt", "the", "--tokens", "7", *options)
    assert run(*command) == 0
    captured = capsys.readouterr()
    pattern = (
        r"([\d,]+) tokens in ([\d.]+) s, reading of prompts included: [\d,.]+ tokens/s by models/transformer on cpu"
    )
    (told,) = re.findall(pattern, captured.err)
    assert "tokens/s" not in captured.out
    if options == ("--json",):
        assert json.loads(captured.out)["tokens"] == int(told[0]) <= 7
    # Nothing was written, and nothing is said.
    assert run(*command, *(f"--stop={chr(code)}" for code in range(1, 128)), "--stop=�") == 0
    assert "tokens/s" not in capsys.readouterr().err


@pytest.mark.parametrize("model", ["calm", "transformer"])
def test_evaluate_writes_a_table_of_documents(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--model", f"models/{model}", "--corpus", "text.jsonl", "--json", "--every", "3") == 0
    told = json.loads(capsys.readouterr().out)
    folder = Path(f"results/evaluations/{model}-text")
    assert told == json.loads((folder / "brierlm.json").read_text())
    table = pl.read_parquet(folder / "documents.parquet")
    assert table["positions"].sum() == told["positions"]
    assert len(table) == told["documents"] <= 6
    assert table["begins"][0].startswith("the quick brown fox")
    weighted = (table["brier_2"] * table["positions"]).sum() / told["positions"]
    assert weighted == pytest.approx(told["brier"][1], abs=1e-9)
    assert ("cross_entropy_nats" in told) == (model == "transformer")


def test_evaluate_takes_a_compressed_glob_and_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for number in range(3):
        Path(f"texts/{number}.txt.gz").write_bytes(gzip.compress((TEXT * 20).encode()))
    options = ("--model", "models/calm", "--context", "12", "--output", "out")
    assert run("evaluate", "--corpus", "texts/*.gz", "--tokens", "100", *options) == 0
    assert "positions in" in capsys.readouterr().out
    assert json.loads(Path("out/brierlm.json").read_text())["positions"] == 4 * (100 - 4) // 12


def test_results_of_the_protocols_are_in_folders_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"brierlm": 5.7167, "brierlm_ci95": [5.5, 5.9], "brier": [0.2, 0.1, 0.05, 0.03], "positions": 2047,
               "documents": 2, "reconstruction_of_mean": 0.99987, "reconstruction_of_sample": 0.5}  # fmt: skip
    negative = {"brierlm": 53.0, "brierlm_ci95": None, "brier": [-0.53] * 4}
    measured = mock.Mock(side_effect=[results, results | negative])
    monkeypatch.setattr("calm_core.inference.reference_protocol.evaluate_by_reference", measured)
    command = ("evaluate", "--model", "models/calm", "--corpus", "text.jsonl", "--protocol", "reference")
    assert run(*command, "--tokens", "9000", "--seed", "5", "--text-field", "body") == 0
    folder = Path("results/evaluations/calm-text-reference")
    assert measured.call_args_list[0].args[1:] == ("text.jsonl", folder, 9000, 5, "body")
    told = capsys.readouterr().out
    assert run(*command) == 0
    assert "BrierLM 53.00 (no score: a mean below 0, and two of them" in capsys.readouterr().out
    assert "BrierLM 5.72 [5.50, 5.90]" in told
    assert "tokens rebuilt by the autoencoder: 99.987 % from a latent's mean, 50.000 % from a sample" in told


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/calm", "calm"),
        ("models/calm/", "calm"),
        ("./models/calm", "calm"),
        ("cccczshao/CALM-M", "cccczshao-CALM-M"),
        ("someone/CALM-M", "someone-CALM-M"),
        ("someone/calm-1.5@v1.0", "someone-calm-1.5-v1.0"),
        (".", "model"),
    ],
)
def test_the_results_of_two_models_do_not_meet(model: str, name: str) -> None:
    assert _model_slug(model) == name


GENERATE = ("generate", "--prompts", "prompts.txt", "--tokens", "6", "--json")


@pytest.mark.parametrize("model", ["calm", "transformer"])
@pytest.mark.parametrize(
    "command",
    [
        GENERATE,
        (*GENERATE, "--temperature", "0.5", "--sampler", "exact"),
        ("evaluate", "--corpus", "text.jsonl", "--tokens", "60", "--json"),
    ],
    ids=["generate", "exact", "evaluate"],
)
def test_the_device_that_is_asked_for(
    command: tuple[str, ...], model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("the\na longer prompt\n")
    command = (*command, "--model", f"models/{model}", "--device")
    assert run(*command, "auto") == 0
    on_cpu = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with pretend_device() as pretend:
        chosen = mock.Mock(return_value=pretend.device)
        monkeypatch.setattr("calm_core.runtime.device.choose_device", chosen)
        assert run(*command, "cuda") == 0
        chosen.assert_called_once_with("cuda", "--device")
        assert pretend.from_device
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["device"] for row in on_cpu] == ["cpu"] * len(on_cpu)
    assert [row["device"] for row in found] == ["meta"] * len(on_cpu)
    for name in ("text", "positions"):
        assert [row.get(name) for row in found] == [row.get(name) for row in on_cpu]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1 MB, max allowed: 9 GB)"),
])  # fmt: skip
def test_a_gpu_without_room_is_told(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("calm_core.inference.language_model.load_language_model", full)
    assert "out of memory; ask for less" in mistake(capsys, "generate", "--model", "models/calm", "--prompt", "a")


def test_checkpoints_come_and_go(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_reference("energy", tmp_path)
    assert run("import-checkpoint", "energy", "own") == 0
    assert "energy head; it has no tokenizer" in capsys.readouterr().out
    assert run("export-checkpoint", "own", "back") == 0
    assert load_file("back/model.safetensors").keys() == reference_weights("energy").keys()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("generate", "Missing option '--model'"),
        ("generate --model models/calm", "one of --prompt TEXT and --prompts FILE"),
        ("generate --model models/calm --prompt a --prompts b", "one of --prompt TEXT and --prompts FILE"),
        ("generate --model models/calm --prompts nothing.txt", "nothing.txt: No such file"),
        ("generate --model models/calm --prompts bytes.txt", "is not UTF-8 text"),
        ("generate --model models/calm --prompts text.jsonl", "text.jsonl, line 1 is no object with a prompt"),
        ("generate --model models/nothing --prompt a", "models/nothing is no folder"),
        ("generate --model models/calm/autoencoder --prompt a", "holds a model of kind 'autoencoder'"),
        ("generate --model models/calm --prompt a --temperature 0", "allowed is 0 < temperature <= 1"),
        ("generate --model models/calm --prompt a --temperature nan", "allowed is 0 < temperature <= 1"),
        ("generate --model models/calm --prompt a --tokens 0", "'--tokens'"),
        ("generate --model models/calm --prompt a --sampler best", "'--sampler'"),
        ("generate --model models/calm --prompt a --device tpu", "'--device'"),
        ("generate --model models/calm --prompt a --device cuda", "--device is cuda, but torch finds no CUDA device"),
        ("evaluate --model models/calm --corpus text.jsonl --device mps", "--device is mps, but torch finds no GPU"),
        ("evaluate --model models/calm --corpus nothing.txt", "nothing.txt matches no file"),
        ("evaluate --model models/calm --corpus text.jsonl --text-field body", "has no field 'body'"),
        ("evaluate --model models/calm --corpus text.jsonl --context 10", "no multiple of the model's K, 3"),
        ("evaluate --model models/calm --corpus text.jsonl --context 3000", "too few for one block of 3000"),
        ("evaluate --model models/calm --corpus hf:a:b:c:d", "a dataset is named hf:NAME"),
        ("evaluate --model models/transformer --corpus text.jsonl --protocol reference", "and a Transformer has none"),
        (
            "evaluate --model models/calm --corpus text.jsonl --protocol reference",
            "the model's K is 3; the reference's",
        ),
        ("evaluate --model x --corpus x --protocol reference --samples 2", "--samples 2: --protocol reference has its"),
        ("evaluate --model x --corpus x --protocol reference --context 64", "leave --context out, or the protocol"),
        ("evaluate --model x --corpus x --protocol reference --every 4", "--every 4: --protocol reference has its own"),
        ("evaluate --model models/calm --corpus text.jsonl --protocol both", "'both' is not one of 'own', 'reference'"),
        ("import-checkpoint nothing new", "nothing is no folder"),
        ("export-checkpoint models/nothing new", "models/nothing is no folder"),
        ("publish models/nothing someone/model --dry-run", "models/nothing is no folder"),
        ("publish models/calm model --dry-run", "model is no name on the Hugging Face hub; OWNER/NAME is needed"),
        ("publish models/calm someone/model@main", "someone/model@main is no name on the Hugging Face hub"),
        ("publish models/calm someone/model --dry-run", "models/calm/README.md is missing, the card"),
        ("export-checkpoint models/calm text.jsonl", "text.jsonl exists"),
        ("preset nothing", "params.yaml is missing"),
        ("unheard-of", "No such command 'unheard-of'"),
    ],
)
def test_mistakes_are_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    assert told in mistake(capsys, *arguments.split())


def test_help_says_how_a_revision_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.argv", ["calm", "generate", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "OWNER/NAME[@REVISION]" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_pydantic() -> None:
    code = """
import sys
from calm_core.cli import main
sys.argv = ["calm", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {"torch", "pydantic", "yaml"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert result.returncode == 0, result.stderr
    for command in (
        "check",
        "preset",
        "plan",
        "generate",
        "demo",
        "evaluate",
        "import-checkpoint",
        "export-checkpoint",
        "publish",
    ):
        assert command in result.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m calm_core.cli generate --model models/transformer --prompt a --tokens 400"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = f"set -o pipefail; {command} | head -c 1 > /dev/null"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("environment", "begins"),
    [({}, "\x1b[2mthe\x1b[0m"), ({"NO_COLOR": "1"}, "the"), ({"TERM": "dumb"}, "the")],
)
def test_a_prompt_is_dim_where_a_terminal_can_show_it(
    environment: dict[str, str], begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with contextlib.redirect_stdout(terminal):
        assert run("generate", "--model", "models/transformer", "--prompt", "the", "--tokens", "2") == 0
    assert terminal.getvalue().startswith(begins)
    assert ("\x1b" in terminal.getvalue()) == ("\x1b" in begins)
