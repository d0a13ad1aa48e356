"""The one exception that a user is meant to read, and others' errors folded into its single line."""


class CalmError(Exception):
    """A mistake in params, data or the machine's state, told in one line: the value, what is allowed, the fix."""


def one_line(error: Exception) -> str:
    """The message of ``error`` with its line breaks folded, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
