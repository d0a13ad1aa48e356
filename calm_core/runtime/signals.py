"""Ctrl-C and SIGTERM, deferred while a block of work must not be interrupted."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C and SIGTERM while the block runs; the yielded function returns whether one has come.

    At the end of the block the signal is delivered to the previous handler: by default, Ctrl-C then raises
    KeyboardInterrupt. Outside the main thread, which alone receives signals, nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        # Restored before the signal is raised again, so that the previous handler gets it.
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
