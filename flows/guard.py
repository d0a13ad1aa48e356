"""Run a command so that no process of it survives the command itself or the process that asked for it.

`python guard.py COMMAND ...` starts COMMAND in a process group of its own and watches standard input. When that
closes, because the asking process closed it, was cancelled or was killed, the whole group gets SIGINT, so that DVC and
the stages clean up, then SIGTERM, then SIGKILL. It needs the standard library alone, and exits with the command's
status.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))


def main() -> int:
    """Run, watch, and return the exit status of the command; 128 + n where signal n ended it."""
    # A session of its own: signals reach the whole group, and a terminal's Ctrl-C only through the guard.
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_end_of_input, args=(command,), daemon=True).start()
    status = command.wait()
    _signal(command.pid, signal.SIGKILL)  # what the command left behind
    return status if status >= 0 else 128 - status


def _stop_at_end_of_input(command: "subprocess.Popen[bytes]") -> None:
    # The kernel closes the pipe however the other side ends, by SIGKILL as well: no signal handler could promise that.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    # To the group, since DVC starts the stage and a stage may start processes.
    for number, seconds in GRACE_SECONDS:
        _signal(command.pid, number)
        try:
            command.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue


def _signal(group: int, number: signal.Signals) -> None:
    # macOS refuses to signal a group of which only ended processes are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main())
