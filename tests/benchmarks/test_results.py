"""The file of results, both tables and the page, from results that are made up; each benchmark exists."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.measure import Result
from benchmarks.results import as_json, key_of, record, results_of
from benchmarks.tables import markdown, number, terminal_table

FAST = Result("a loss, forward", "the formula", 12.34, "times as fast", ">=", 10, {"seconds": 0.5})
SLOW = Result("`dvc repro`", "the clock", 3.456, "s", "<=", 3, {"seconds": 3.456})
MACHINE = {
    "processor": "Model 1",
    "threads": "2",
    "bfloat16": "emulated",
    "system": "Linux",
    "packages": "numpy 2.0, torch 2.13.0, dvc 3.60",
    "git revision": "abc",
}


def test_keys_are_plain() -> None:
    assert key_of("CALM K 4 at T 1/2, batch 16") == "calm_k_4_at_t_1_2_batch_16"
    assert key_of("`dvc repro`") == "dvc_repro"


def test_two_results_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        as_json([FAST, FAST._replace(name="A loss: forward")], 1.0, MACHINE)


def test_the_file_holds_plain_numbers_and_gives_results_back(tmp_path: Path) -> None:
    path = tmp_path / "results/benchmarks.json"
    record("loss", as_json([FAST, SLOW], 60.0, MACHINE), ["loss"], path)
    (entry,) = json.loads(path.read_text(encoding="utf-8")).values()
    assert entry["seconds"] == 60 and entry["machine"] == MACHINE
    assert entry["results"]["dvc_repro"] == {
        "name": "`dvc repro`",
        "yardstick": "the clock",
        "value": 3.456,
        "unit": "s",
        "comparison": "<=",
        "goal": 3,
        "details": {"seconds": 3.456},
        "met": False,
    }
    assert results_of(entry) == [FAST, SLOW]


def test_a_benchmark_replaces_its_own_results_alone(tmp_path: Path) -> None:
    path, order = tmp_path / "benchmarks.json", ["first", "second"]
    for name, value in (("second", 1.0), ("gone", 1.0), ("first", 1.0), ("second", 2.0)):
        allowed = [*order, "gone"] if name == "gone" else order
        record(name, as_json([FAST._replace(value=value)], 1.0, MACHINE), allowed, path)
    held = json.loads(path.read_text(encoding="utf-8"))
    assert list(held) == order
    assert [results_of(entry)[0].value for entry in held.values()] == [1.0, 2.0]


def test_the_terminal_shows_what_is_missed() -> None:
    console = Console(record=True, width=120, force_terminal=True, file=StringIO())
    console.print(terminal_table([FAST, SLOW]))
    styled = console.export_text(styles=True, clear=False)
    plain = console.export_text()
    assert "1 of 2 goals met" in plain
    (fast,), (slow,) = ([line for line in plain.splitlines() if name in line] for name in ("a loss", "dvc repro"))
    assert "12.3 times as fast" in fast and ">= 10" in fast and "yes" in fast
    assert "3.46 s" in slow and "<= 3" in slow and "no" in slow
    assert "\x1b[1;31m`dvc repro`" in styled


def entries(*machines: dict[str, str]) -> dict[str, Any]:
    rows = ([FAST], [SLOW])
    return {f"b{i}": as_json(rows[i], 90.0, machine) for i, machine in enumerate(machines)}


def test_markdown_names_one_machine_once() -> None:
    lines = markdown(entries(MACHINE, MACHINE)).splitlines()
    assert lines[2:4] == [
        "| a loss, forward | the formula | 12.3 times as fast | >= 10 | yes |",
        "| `dvc repro` | the clock | 3.46 s | <= 3 | **no** |",
    ]
    assert lines[5] == "1 of 2 goals met."
    assert lines[6:] == [
        "Measured in 3 minutes on 2 threads of Model 1, bfloat16 emulated, Linux, torch 2.13.0, revision abc."
    ]


def test_markdown_tells_machines_apart() -> None:
    other = {**MACHINE, "git revision": "def"}
    told = markdown(entries(MACHINE, other)).splitlines()[6:]
    assert [line.partition(" on ")[0] for line in told] == [
        "Measured in 2 minutes (b0)",
        "Measured in 2 minutes (b1)",
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.8123, "0.812"), (12.34, "12.3"), (1234.5, "1234"), (2.1e-7, "2.1e-07")]
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_the_page_gets_the_table(tmp_path: Path) -> None:
    results, page = tmp_path / "benchmarks.json", tmp_path / "page.md"
    record("loss", as_json([FAST], 1.0, MACHINE), ["loss"], results)
    page.write_text("before\n<!-- benchmarks -->\nold\n<!-- end of benchmarks -->\nafter\n", encoding="utf-8")
    command.write_docs(results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| a loss, forward |" in text and "old" not in text


def test_a_mistake_is_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["--write-docs"]) == 2
    assert capsys.readouterr().err == "benchmarks: results/benchmarks.json is missing; `make bench` measures it\n"
    with pytest.raises(SystemExit, match="2"):
        command.main(["speed"])
    assert "speed is unknown; there are: training_steps, " in capsys.readouterr().err


def test_missed_goals_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "set_threads", lambda threads: 1)
    monkeypatch.setattr(command, "_function", lambda name: lambda: [SLOW])
    assert command.main(["starting"]) == 0
    assert "0 of 1 goals met" in capsys.readouterr().out
    assert results_of(json.loads(Path("results/benchmarks.json").read_text(encoding="utf-8"))["starting"]) == [SLOW]


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_each_name_is_a_benchmark(name: str) -> None:
    assert callable(command._function(name))
