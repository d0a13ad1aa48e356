"""A Hugging Face hub on the loopback: what `huggingface_hub` asks when it fetches or uploads a model, in memory.

Written by the library's requests, which a test prints with HF_DEBUG=1; the hub's own API is documented at
https://huggingface.co/docs/hub/api.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Hub:
    """The models of a hub, and what was asked of it."""

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each OWNER/NAME, by their paths."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request, in the order of their coming."""
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    """The one token that may write."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files, by their SHA-256."""

    def commit(self, name: str) -> str:
        """The hash of what ``name`` holds now."""
        held = hashlib.sha1(name.encode())
        for path, content in sorted(self.models[name].items()):
            held.update(path.encode() + content)
        return held.hexdigest()


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """A hub that listens at ``Hub.url`` while the context is open."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Let this process's huggingface_hub take ``url`` for the hub, with an empty cache and no token under ``home``."""
    from huggingface_hub import constants

    # Constants of the library, which it reads from the environment as it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing: standard error is the test's."""

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(revision|tree)/([^/]+))?", path):
            self._answer_about(asked[1], asked[3] or "revision", asked[4] or "main")
        elif asked := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file(asked[1], asked[2], asked[3])
        else:
            self._answer(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif self.command == "PUT":
            # By an address that was given out, which is the right to write there.
            self.hub.stored[path.removeprefix("/store/")] = content
            self._answer(200)
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401)
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self._answer_json({"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/store/{wanted['oid']}"}}}
                for wanted in json.loads(content)["objects"]
            ]
            self._answer_json({"transfer": "basic", "objects": objects})
        elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(asked[1], [json.loads(line) for line in content.splitlines()])
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        self.do_POST()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.models
        if not there:
            self.hub.models[name] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(name)
        content = json.dumps({"url": f"{self.hub.url}/{name}", "name": name}).encode()
        self._answer(409 if there else 200, content, {"Content-Type": "application/json"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.models[name][value["path"]] = self.hub.stored[value["oid"]]
        commit = self.hub.commit(name)
        self._answer_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _found(self, name: str, revision: str) -> bool:
        if name in self.hub.gated:
            self._answer(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name not in self.hub.models:
            self._answer(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in ("main", self.hub.commit(name)):
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return True
        return False

    def _answer_about(self, name: str, question: str, revision: str) -> None:
        if not self._found(name, revision):
            return
        files = self.hub.models[name]
        if question == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": self.hub.commit(name), "siblings": siblings}
            self._answer_json({**about, "private": name in self.hub.private})
        else:
            self._answer_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )

    def _answer_file(self, name: str, revision: str, path: str) -> None:
        if not self._found(name, revision):
            return
        content = self.hub.models[name][path]
        about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit(name)}
        self._answer(200, content, about)

    def _answer_json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
