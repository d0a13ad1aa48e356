"""The one exception that a user is meant to read."""


class CalmError(Exception):
    """A mistake in params, data or the machine's state, told in one line: the value, what is allowed, the fix."""
