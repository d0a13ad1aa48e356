"""`make ui`: a local Prefect server on the loopback, and the deployments of prefect.yaml served from this process."""

import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from flows.processes import Processes

HOST, PORT = "127.0.0.1", 4200
START_SECONDS = 90


def main() -> None:
    """Start the server unless one answers already, then serve until interrupted."""
    port = int(os.environ.get("PREFECT_SERVER_API_PORT", PORT))
    address = f"http://{HOST}:{port}"
    os.environ.setdefault("PREFECT_API_URL", f"{address}/api")
    # Nothing leaves the machine unless the user asks for it.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    processes = Processes()
    if not _answers(address):
        command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
        lines: list[str] = []
        # A daemon thread reads the server's output, which would otherwise fill the pipe and block the server.
        threading.Thread(target=processes.run, args=(command, Path.cwd(), lines.append), daemon=True).start()
        deadline = time.monotonic() + START_SECONDS
        while not _answers(address):
            if time.monotonic() > deadline:
                sys.exit(f"the Prefect server does not answer at {address}: {' '.join(lines[-3:])}")
            time.sleep(0.5)
    print(f"Prefect UI: {address}  (Ctrl-C ends it)", flush=True)
    # Only now: Prefect reads its settings when it is imported.
    from prefect import serve

    from flows.serve import deployments

    try:
        serve(*deployments(), pause_on_shutdown=False)
    finally:
        processes.stop()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
