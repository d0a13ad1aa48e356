"""What SECURITY.md promises: nothing that is read runs code or becomes part of a page, and servers are local."""

import ast
import html
import json
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import flows.ui
from calm_core.corpus.documents import documents
from calm_core.params import CorpusParams, Params, load_params, parse_params
from calm_core.report.model_card import render_model_card
from calm_core.report.page import render_report
from flows.artifacts import _code
from flows.processes import Processes
from tests import ROOT
from tests.calm_core.report.test_page import report_arguments
from tests.reliability.support.bad_input import TEXTS, complaint, tries
from verification.audit import CLEAN, UNKNOWN, VULNERABLE, judge

SOURCES = [
    path
    for part in ("calm_core", "stages", "flows", "benchmarks", "verification")
    for path in (ROOT / part).rglob("*.py")
]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title = \'taken\'">',
    "</pre></script><svg onload=\"document.title = 'taken'\">",
    "{{ 7 * 7 }}{% include 'x' %}",
    "<!--",
    "&lt;b&gt;&amp;",
)

PLAIN = "nothing special"

RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load", "joblib.load",
    "runpy.run_path",
}  # fmt: skip


def calls(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each call in ``path``: what is called, and the constants among its keywords."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            constants = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            found.append((ast.unparse(node.func), constants))
    return found


def test_the_project_calls_nothing_that_runs_what_it_reads() -> None:
    loads = 0
    for path in SOURCES:
        for name, keywords in calls(path):
            assert name not in RUNS_CODE, (path, name)
            assert not keywords.get("shell"), (path, name)
            assert not keywords.get("allow_pickle"), (path, name)
            assert "trust_remote_code" not in keywords, (path, name)
            if name == "torch.load":
                assert keywords.get("weights_only") is True, path
                loads += 1
            if name == "YAML":  # ruamel's: round trip or safe
                assert not {"unsafe"} & {str(value) for value in keywords.values()}, path
    assert loads == 1


def test_params_make_no_objects(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    path = tmp_path / "params.yaml"
    for call in ("os.system", "subprocess.check_output", "builtins.exec", "pathlib.Path.touch"):
        for value in (f'!!python/object/apply:{call} ["touch {harm}"]', f"!!python/object/new:{call} [{harm}]"):
            path.write_text(f"seed: {value}\n")
            assert "is not valid YAML" in (complaint(lambda: load_params(path)) or "")
    assert not harm.exists()


@pytest.mark.parametrize("data", [{}, {"a.txt": "text"}, {"train.parquet": "PAR1"}])
def test_a_script_of_a_dataset_is_not_run(data: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nraise SystemExit\n")
    for name, text in data.items():
        (folder / name).write_text(text)
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["corpus"]
    for dataset in (folder, folder / "mine.py"):
        corpus = CorpusParams.model_validate({**section, "source": "huggingface", "dataset": str(dataset)})
        assert "no code of a dataset is run" in (complaint(lambda corpus=corpus: list(documents(corpus))) or "")
    assert not (tmp_path / "harm").exists()


def test_reading_files_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: asked.append(arguments) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "more"}')
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["corpus"]
    corpus = CorpusParams.model_validate({**section, "source": "files", "paths": [str(tmp_path)]})
    assert list(documents(corpus)) == ["text", "more"]
    assert not asked


class Page(HTMLParser):
    """The tags and attributes of a page, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.comments = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(yaml.safe_load((ROOT / "params.yaml").read_text()))


def page_with(text: str, params: Params) -> str:
    """A report that holds ``text`` wherever text from elsewhere can stand."""
    return render_report(
        **{
            **report_arguments(params),
            "params_text": text,
            "corpus": {**report_arguments(params)["corpus"], "source": text, "licence": text},
            "samples": [dict.fromkeys(("prompt", "truth", "calm", "transformer"), text)],
            "machine": {"processor": text, text: text},
        }
    )


def test_no_text_becomes_part_of_the_report(params: Params) -> None:
    without = page_with(PLAIN, params)
    plain = Page(without)
    assert plain.tags.count("script") == 2
    hostile = "".join(HOSTILE)
    page = Page(page_with(hostile, params))
    assert (page.tags, page.attributes, page.comments) == (plain.tags, plain.attributes, plain.comments)
    assert page.text.count(hostile) == plain.text.count(PLAIN) == 10
    script = without.split("<script>")[-1]
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval|Function", script)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium")
def test_a_browser_runs_nothing_of_it(params: Params, tmp_path: Path) -> None:
    hostile = "".join(HOSTILE)
    (tmp_path / "report.html").write_text(page_with(hostile, params), encoding="utf-8")
    timings = {hostile: {"seconds": 1.0, "training_tokens_per_second": 3.0, "machine": hostile}}
    # As stages/runner/run.py writes it.
    script = f"window.timings = {json.dumps(timings)};\n"
    (tmp_path / "timings.js").write_text(script, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    seen = Page(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
    assert "CALM: report of a run" in seen.text
    assert "taken" not in re.sub(r"document\.title = 'taken'", "", seen.text)
    assert hostile in seen.text
    assert "img" not in seen.tags
    assert not {name for name in seen.attributes if name.startswith("on")}


@tries(100)
@given(text=TEXTS | st.sampled_from(HOSTILE) | st.text(st.sampled_from("`\n<b>~ "), max_size=30))
def test_nothing_ends_a_block_of_code(text: str) -> None:
    opening, *inside, closing, end = _code(text, "yaml").split("\n")
    fence = opening.removesuffix("yaml")
    assert set(fence) == {"`"}
    assert len(fence) >= 3
    assert (closing, end) == (fence, "")
    assert "\n".join(inside) == text
    assert not any(fence in line for line in inside)


def test_no_text_becomes_part_of_a_model_card() -> None:
    split = {"documents": 1, "tokens": 1}
    for text in (
        *HOSTILE,
        "a | b\n| c | d |\n\n# heading",
        "x\n---\nlicense: other\n---\n",
        "'\"\n: - {[&*!%@`",
        "dataset: \n- a",
    ):
        corpus = {"source": text, "licence": text, "splits": {"train": split, "test": split}}
        results = {"score": text, "brierlm": 1.0}
        card = render_model_card(
            "calm", {"kind": "calm", "head": {"kind": text}, "x": text}, corpus, {"corpus": text}, results
        )
        read = ModelCard(card)
        assert read.text.startswith("# CALM")
        assert read.data.license == "mit"
        (result,) = read.data.eval_results
        assert html.unescape(result.dataset_name) == " ".join(text.split())
        assert result.metric_value == 1.0
        assert "\n# heading" not in card
        assert not re.search("<(script|img|svg|!--)", card)
        table = [line for line in card.splitlines() if line.startswith("|")]
        assert all(line.count("|") == 3 for line in table)


def test_the_server_listens_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_HOST", "0.0.0.0")
    for name in ("PREFECT_API_URL", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_SERVER_API_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    started: list[list[str]] = []
    monkeypatch.setattr(Processes, "run", lambda self, command, folder, on_line: started.append(command) or 0)
    monkeypatch.setattr(flows.ui, "_answers", lambda address: bool(started))
    monkeypatch.setattr(flows.ui.time, "sleep", lambda seconds: None)
    served = ModuleType("prefect"), ModuleType("flows.serve")
    served[0].serve = lambda *deployments, **options: None  # type: ignore[attr-defined]
    served[1].deployments = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefect", served[0])
    monkeypatch.setitem(sys.modules, "flows.serve", served[1])
    flows.ui.main()
    (command,) = started
    assert command[:3] == ["prefect", "server", "start"]
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_an_audit_that_could_look_nothing_up_is_no_clean_one() -> None:
    clean = {"name": "a", "version": "1", "vulns": []}
    skipped = {"name": "b", "skip_reason": "not found"}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert judge([clean]) == (["no known vulnerability in 1 packages"], CLEAN)
    assert judge([clean, skipped])[1] == judge([skipped])[1] == UNKNOWN
    lines, status = judge([clean, skipped, bad])
    assert status == VULNERABLE
    assert lines[0] == "c 2: CVE-1, mended in 3"
    assert "1 of 3 packages could not be looked up" in lines[1]
