"""The page of `calm demo`, and the texts that it shows as they are written.

Notable:
- one text at a time, whoever asks: two at once would slow each other, and no speed would be true. The others wait,
  which their pages say;
- sampling has a thread of its own, so that the page answers meanwhile. A reader who goes away, or a server that is
  ended, stops it after the step that it is at;
- it listens on the loopback alone. Other sites that the browser visits reach it neither by a name that they point at
  the loopback (the Host header) nor by a form or a script (what is sent has to be JSON, which browsers send nowhere
  else without asking). The page loads nothing, and its policy allows no script but its own.
"""

import asyncio
import base64
import errno
import hashlib
import json
import socket
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from calm_core.calm.model import Calm
from calm_core.demo.turns import side_by_side
from calm_core.errors import CalmError, one_line
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import LanguageModel

HOST = "127.0.0.1"
DEFAULT_MODELS = (Path("models/calm"), Path("models/transformer"))
LARGEST_BODY = 1 << 20
"""Bytes of what a page asks for, at most."""
STOP_SECONDS = 3
"""How long an ended server waits for a reader who takes nothing any more."""


class Asked(BaseModel):
    """What the page asks for; the limits are those of `calm generate`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    prompt: str
    tokens: Annotated[int, Field(ge=1, le=10**9)] = 128
    temperature: Annotated[float, Field(gt=0, le=1)] = 1.0
    draws: Annotated[int, Field(ge=1, le=500)] = Sampling().draws
    """N: samples that a step below temperature 1 is chosen from, by a CALM that samples latents."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0


def application(models: Mapping[str, LanguageModel], ended: Callable[[], bool] = lambda: False) -> Starlette:
    """The page and its two addresses, for the models of these names.

    /models describes them. /write takes ``Asked`` as JSON, and answers with lines of JSON: the ``Reading``s and
    ``Piece``s of ``side_by_side``, {"waiting": true} before them while another text is written, and {"error": TEXT}
    where they end early.
    Once ``ended`` is true a text ends at its next step.
    """
    turn = asyncio.Lock()
    sampling_thread = ThreadPoolExecutor(1, "sampling")
    sampling_thread.submit(_warm_up, list(models.values()))
    html = files("calm_core.demo").joinpath("page.html").read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _policy(html), "X-Content-Type-Options": "nosniff"}

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=page_headers)

    async def describe(request: Request) -> Response:
        return JSONResponse({"models": [_about(*item) for item in models.items()], "draws": Sampling().draws})

    async def write(request: Request) -> Response:
        try:
            asked = await _asked(request)
        except CalmError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return _Lines(lines(asked), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    async def lines(asked: Asked) -> AsyncGenerator[str, None]:
        if turn.locked():
            yield _line({"waiting": True})
        async with turn:
            sampling = Sampling(asked.temperature, draws=asked.draws)
            pieces = side_by_side(list(models.values()), asked.prompt, asked.tokens, sampling, asked.seed)
            try:
                while not ended():
                    piece = await asyncio.get_running_loop().run_in_executor(sampling_thread, next, pieces, None)
                    if piece is None:
                        return
                    yield _line(asdict(piece))
            except CalmError as error:
                yield _line({"error": str(error)})
            except Exception as error:
                # A fault of this program, or no memory: one line here, and the traceback where the server runs.
                traceback.print_exc()
                yield _line({"error": one_line(error)})
            finally:
                sampling_thread.submit(pieces.close)  # after the step that may still run there

    routes = [Route("/", page), Route("/models", describe), Route("/write", write, methods=["POST"])]
    own_names = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[own_names])


def listen(port: int) -> socket.socket:
    """A socket at ``port`` of the loopback, at any free one for 0; it does not take connections yet.

    Raises:
        CalmError: another program has the port, or the system reserves it.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        told = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise CalmError(f"port {port} of {HOST} {told}; name another as --port, or 0 for any free one") from None
    return listener


def serve(models: Mapping[str, LanguageModel], listener: socket.socket, started: Callable[[str], object]) -> None:
    """Serve the page of ``models`` on ``listener`` until interrupted; ``started`` gets its address.

    Raises:
        KeyboardInterrupt: at Ctrl-C, when all texts have ended.
    """
    server: uvicorn.Server
    app = application(models, lambda: server.should_exit)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", lifespan="off", loop="asyncio", ws="none", timeout_graceful_shutdown=STOP_SECONDS
        )
    )
    listener.listen()  # from here on connections wait until the server takes them
    started(f"http://{HOST}:{listener.getsockname()[1]}")
    server.run([listener])


def _warm_up(models: Sequence[LanguageModel]) -> None:
    """Take two steps: a process's first ones are slow, and would count as the time of whichever model comes first."""
    for model in models:
        deque(islice(model.stream([[]], 2 * model.patch_size, Sampling(), 0), 2), 0)


class _Lines(StreamingResponse):
    """A stream whose generator is closed as soon as the reader goes away, and not when its memory is collected."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def _asked(request: Request) -> Asked:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise CalmError("what is asked for has to be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise CalmError(f"the prompt is too long; at most {LARGEST_BODY:,} bytes are read")
    try:
        return Asked.model_validate_json(bytes(body))
    except ValidationError as error:
        raise CalmError("; ".join(map(_told, error.errors()))) from None


def _told(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"])) or "request"
    named = {"draws": "N", "temperature": "T"}.get(name, name)
    return f"{named}: {problem['msg'].removeprefix('Input ').removeprefix('Value error, ')}"


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _about(name: str, model: LanguageModel) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "CALM" if isinstance(model.model, Calm) else "Transformer",
        "patch_size": model.patch_size,
        "samples_latents": model.autoencoder is not None,
        "context_tokens": model.context_tokens,
        "device": model.device.type,
    }


def _policy(html: str) -> str:
    """A content security policy: nothing but the page's own script, its styles and this server."""
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
