"""The command `calm`, also as `python -m calm_core`: Ctrl-C ends it without a traceback while it still imports."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line, whose main function has a handler of its own."""
    from calm_core.cli import main as run

    run()


if __name__ == "__main__":
    main()
