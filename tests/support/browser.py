"""A page in headless Chromium, driven by the DevTools protocol: what people see, type and click."""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


class Page:
    """One page, and the connection that drives it; each answer is waited for ``seconds`` at most."""

    def __init__(self, connection: ClientConnection, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._numbers = itertools.count()
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters, **self._session}))
        while True:  # events come between the answers
            message = json.loads(self._connection.recv(self._seconds))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, once it is there if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def visit(self, address: str) -> None:
        """Open ``address``, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def until(self, condition: str) -> None:
        """Wait until a JavaScript condition on the page is true; it is looked at again after each change."""
        self.evaluate(
            "new Promise(done => { const look = () => { if (" + condition + ") { done(true); watch.disconnect(); } };"
            "const watch = new MutationObserver(look);"
            "watch.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});"
            "addEventListener('load', look); look(); })"
        )

    def type(self, text: str) -> None:
        """Type into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the first element that ``selector`` finds."""
        middle = "{const box = document.querySelector(SELECTOR).getBoundingClientRect();"
        middle += "({x: box.x + box.width / 2, y: box.y + box.height / 2})}"
        place = self.evaluate(middle.replace("SELECTOR", json.dumps(selector)))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def size(self, width: int, height: int) -> None:
        """Make the page so large, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        """Write what is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser_page(folder: Path, seconds: float = 120) -> Iterator[Page]:
    """An empty page in a browser of its own, which keeps its profile in ``folder``."""
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stderr is not None
        told = (line.partition("DevTools listening on ")[2].strip() for line in process.stderr)
        address = next(filter(None, told))
        with connect(address, max_size=None, open_timeout=seconds) as connection:
            yield Page(connection, seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
