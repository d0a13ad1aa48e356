"""Standard streams as a shell may leave them: closed, full, or without a reader."""

import contextlib
import os
import sys
from typing import IO

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_closed_streams() -> list[str]:
    """Put the null device in place of each standard stream that is closed (`>&-`); returns their names.

    The next file to be opened would get the stream's number, and with it what libraries print; and Python prints on
    standard output what is meant for a standard error that is not there.
    """
    closed = [(name, mode) for name, mode in _STREAMS if getattr(sys, name) is None]
    for name, mode in closed:
        # The lowest free number, which is the stream's own.
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(descriptor, True)
        setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as the process
    return [name for name, _ in closed]


def give_up(*streams: IO[str]) -> None:
    """Drop what ``streams`` still hold: Python writes it at its end, and would fail once more."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # one that is no file
            os.dup2(null, stream.fileno())
    os.close(null)
