"""How a held-out split is cut for BrierLM: blocks of the models' context, each with the four tokens that follow."""

from calm_core.errors import CalmError

MAX_TOKENS = 4
"""Tokens that BrierLM asks for after a position: Brier-4 is the longest."""


def require_block(tokens: int, context: int) -> int:
    """How many blocks of ``context`` tokens a split of ``tokens`` holds; raises CalmError if there is none."""
    blocks = (tokens - MAX_TOKENS) // context
    if blocks < 1:
        raise CalmError(
            f"the held-out text has {tokens} tokens, too few for one block of {context} and {MAX_TOKENS} more; "
            "use more text, a larger corpus.validation_percent or a shorter context"
        )
    return blocks
