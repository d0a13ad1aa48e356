"""The one exception that a user is meant to read, and others' errors folded into its single line."""

LONGEST = 4000
"""Characters of a message, at most: a value or a list of names in it may be far longer."""


class CalmError(Exception):
    """A mistake in params, data or the machine's state, as one line: the value, what is allowed, the fix.

    Messages quote file names, fields and values as they are. Line breaks and control characters in them are folded or
    escaped here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(single_line(message))


def one_line(error: BaseException) -> str:
    """The message of ``error`` with its line breaks folded, or its type where it has none."""
    return single_line(str(error)) or type(error).__name__


def single_line(text: str) -> str:
    """``text`` with white space folded, control characters and lone surrogates escaped, and no longer than ``LONGEST``.

    The end stays, since that is where a message says what to do.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"
    # Terminals obey control characters, and a file name may hold any: escaped, they are text.
    folded = " ".join(text.split())
    return folded if folded.isprintable() else "".join(map(_printable, folded))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
