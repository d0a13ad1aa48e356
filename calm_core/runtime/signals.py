"""Ctrl-C and SIGTERM, held back while something must not break off in the middle."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM while the block runs; the block asks the yielded function whether one has come.

    At the end of the block what has come is delivered to whoever handled it before: Ctrl-C then raises
    KeyboardInterrupt, unless the program has other plans. Outside the main thread, which alone receives signals,
    nothing is held back.
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
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
