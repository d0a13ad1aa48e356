"""What the server of `calm demo` gives to whom: texts to its own page, one line for a mistake, nothing to others."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from calm_core.cli import main
from calm_core.demo.server import LARGEST_BODY, application, listen
from calm_core.errors import CalmError
from calm_core.inference.language_model import Continuation, LanguageModel
from tests.calm_core.demo.test_turns import as_class

ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def client(models: dict[str, LanguageModel]) -> TestClient:
    return TestClient(application(models), ADDRESS)


def events(client: TestClient, **asked: Any) -> list[dict[str, Any]]:
    answer = client.post("/write", json=asked)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_texts_are_those_that_the_models_write_alone(client: TestClient, models: dict[str, LanguageModel]) -> None:
    # As the page sends them: what stands in its fields.
    told = events(client, prompt="the qu", tokens="20", temperature="0.5", draws="200", seed="3")
    for number, model in enumerate(models.values()):
        (alone,) = model.generate(["the qu"], tokens=20, temperature=0.5, seed=3)
        written = "".join(event.get("text", "") for event in told if event["model"] == number)
        assert written in (alone, alone.rstrip("�"))
    assert not {event["model"] for event in told} - {0, 1}


def test_n_is_what_a_step_of_calm_is_chosen_from(client: TestClient) -> None:
    told = events(client, prompt="", tokens=6, temperature=0.5, draws=7)
    for event in told[2:]:
        assert event["samples"] == (event["steps"] * 7 if event["model"] == 0 else event["tokens"])
    assert len(told) > 4


def test_the_models_are_described(client: TestClient) -> None:
    about = client.get("/models").json()
    assert about["draws"] == 200
    assert [(one["name"], one["kind"], one["patch_size"], one["samples_latents"]) for one in about["models"]] == [
        ("calm", "CALM", 3, True),
        ("transformer", "Transformer", 1, False),
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "a", "temperature": "0"}, "T: should be greater than 0"),
        ({"prompt": "a", "temperature": 1.01}, "T: should be less than or equal to 1"),
        ({"prompt": "a", "temperature": "nan"}, "T: "),
        ({"prompt": "a", "tokens": 0}, "tokens: should be greater than or equal to 1"),
        ({"prompt": "a", "tokens": ""}, "tokens: should be a valid integer"),
        ({"prompt": "a", "tokens": 10**9 + 1}, "tokens: should be less than or equal to 1000000000"),
        ({"prompt": "a", "draws": 0}, "N: should be greater than or equal to 1"),
        ({"prompt": "a", "draws": 501}, "N: should be less than or equal to 500"),
        ({"prompt": "a", "seed": -1}, "seed: should be greater than or equal to 0"),
        ({"prompt": "a", "seed": str(2**63)}, "seed: should be less than or equal to 9223372036854775807"),
        ({"prompt": "a", "model": "/etc/passwd"}, "model: Extra inputs are not permitted"),
        ({"prompt": "\ud800"}, "request: Invalid JSON"),
        ({"prompt": "a" * LARGEST_BODY}, "the prompt is too long"),
    ],
)
def test_a_mistake_is_one_line(asked: dict[str, Any], told: str, client: TestClient) -> None:
    content = json.dumps(asked)
    answer = client.post("/write", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(told)
    assert len(answer.json()["error"].splitlines()) == 1


def test_the_limits_themselves_are_allowed(client: TestClient) -> None:
    for asked in (
        {"tokens": 1, "temperature": 1, "draws": 1, "seed": 0},
        {"tokens": 1, "temperature": 0.1, "draws": 500, "seed": str(2**63 - 1)},
    ):
        told = events(client, prompt="", **asked)
        assert {event["model"] for event in told if event.get("tokens") == 1} == {0, 1}


def test_other_sites_reach_nothing(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "0.0.0.0:8000"):
        for path in ("/", "/models"):
            assert client.get(path, headers={"host": host}).status_code == 400
        assert client.post("/write", json={"prompt": ""}, headers={"host": host}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200
    # What a form or a script of another site can send without asking.
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain;application/json",
    ):
        answer = client.post("/write", content='{"prompt": ""}', headers={"content-type": kind})
        assert answer.json() == {"error": "what is asked for has to be application/json"}
    assert "access-control-allow-origin" not in client.get("/models", headers={"origin": "http://evil.example"}).headers


def test_no_file_is_served(client: TestClient) -> None:
    for path in ("/page.html", "/server.py", "/..%2fpyproject.toml", "/models/calm/config.json", "/static/page.html"):
        assert client.get(path).status_code == 404


def test_the_page_runs_its_own_script_alone(client: TestClient) -> None:
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    (script,) = re.findall("<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval|Function", script)
    assert not re.search(r"""https?://|src=|\son\w+=""", answer.text)


@dataclass(frozen=True)
class Faulty(LanguageModel):
    """A model whose second step fails."""

    fault: Exception = field(kw_only=True)

    def stream(self, *arguments: Any) -> Iterator[list[Continuation]]:
        yield [Continuation([50])]
        raise self.fault


@pytest.mark.parametrize("fault", [CalmError("it cannot go on"), RuntimeError("it cannot\ngo on")])
def test_an_error_while_it_writes_is_one_line(
    fault: Exception, models: dict[str, LanguageModel], capsys: pytest.CaptureFixture[str]
) -> None:
    app = application({"faulty": as_class(Faulty, models["transformer"], fault=fault)})
    for _ in range(2):  # the next text has its turn
        told = events(TestClient(app, ADDRESS), prompt="")
        assert told[-1] == {"error": "it cannot go on"}
        assert len(told) == 3
        # Where the server runs, a fault of this program keeps its traceback.
        assert ("Traceback" in capsys.readouterr().err) is not isinstance(fault, CalmError)


@dataclass(frozen=True)
class Endless(LanguageModel):
    """A model that writes without end, and counts its steps."""

    steps: list[None] = field(kw_only=True, default_factory=list)
    closed: threading.Event = field(kw_only=True, default_factory=threading.Event)

    def stream(self, *arguments: Any) -> Iterator[list[Continuation]]:
        continuation = Continuation()
        try:
            while len(self.steps) < 50_000:  # by then somebody should have stopped it
                self.steps.append(None)
                continuation.token_ids.append(50)
                yield [continuation]
        finally:
            self.closed.set()


class Reader:
    """A client of the application, by ASGI: ``received`` gets the lines of /write, ``leave`` closes the connection."""

    def __init__(self, app: Starlette, spec_version: str) -> None:
        self.received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.leave = asyncio.Event()
        self._body = iter([json.dumps({"prompt": "", "tokens": 10**9}).encode()])
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/write", "query_string": b"", "headers": headers}
        self.ended = asyncio.ensure_future(
            app({**scope, "asgi": {"version": "3.0", "spec_version": spec_version}}, self._receive, self._send)
        )

    async def _receive(self) -> dict[str, Any]:
        for body in self._body:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.leave.is_set():
            raise OSError("the connection is closed")
        for line in message.get("body", b"").splitlines():
            self.received.put_nowait(json.loads(line))


def with_time(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


# Servers tell that a reader has left by a message, and from 2.4 on by an error when something is sent.
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_reader_that_leaves_stops_the_text_and_the_next_one_has_its_turn(
    spec_version: str, models: dict[str, LanguageModel]
) -> None:
    async def test() -> None:
        model = as_class(Endless, models["transformer"])
        app = application({"endless": model})
        first = Reader(app, spec_version)
        while (await first.received.get()).get("tokens", 0) < 3:
            pass
        model.closed.clear()  # the warm-up has set it
        second = Reader(app, spec_version)
        assert await second.received.get() == {"waiting": True}
        first.leave.set()
        await asyncio.wait([first.ended])
        assert await asyncio.to_thread(model.closed.wait, 30)
        assert (await second.received.get())["read_tokens"] == 0
        assert (await second.received.get())["tokens"] == 1
        second.leave.set()
        await asyncio.wait([second.ended])

    with_time(test)


def test_a_reader_that_leaves_while_it_waits(models: dict[str, LanguageModel]) -> None:
    async def test() -> None:
        app = application({"endless": as_class(Endless, models["transformer"])})
        readers = [Reader(app, "2.3") for _ in range(3)]
        await readers[0].received.get()
        for reader in readers[1:]:
            assert await reader.received.get() == {"waiting": True}
        for gone in (1, 0):
            readers[gone].leave.set()
            await asyncio.wait([readers[gone].ended])
        assert (await readers[2].received.get())["read_tokens"] == 0
        readers[2].leave.set()
        await asyncio.wait([readers[2].ended])

    with_time(test)


def test_the_end_of_the_server_is_the_end_of_a_text(models: dict[str, LanguageModel]) -> None:
    model = as_class(Endless, models["transformer"])
    app = application({"endless": model}, lambda: len(model.steps) >= 9)
    told = events(TestClient(app, ADDRESS), prompt="", tokens=10**9)
    assert 1 <= len(told) <= 9


def test_a_port_in_use_is_told_before_anything_is_loaded(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("calm_core.inference.language_model.load_language_model", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CalmError, match=f"port {port} of 127.0.0.1 is in use; name another as --port"):
            listen(port)
        assert told_by_demo(monkeypatch, capsys, "--model", str(folders / "calm"), "--port", str(port)).startswith(
            f"calm: port {port} of 127.0.0.1 is in use"
        )


def test_missing_models_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "models/calm is missing: `dvc repro` makes it" in told_by_demo(monkeypatch, capsys)
    (tmp_path / "models/calm").mkdir(parents=True)
    assert "models/transformer is missing: `dvc repro` makes it" in told_by_demo(monkeypatch, capsys)
    assert "nothing is no folder" in told_by_demo(monkeypatch, capsys, "--model", "nothing", "--port", "0")
    assert "'--port'" in told_by_demo(monkeypatch, capsys, "--port", "65536")


def told_by_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in."""
    monkeypatch.setattr(sys, "argv", ["calm", "demo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out, len(told.err.splitlines())) == (2, "", 1)
    return told.err
