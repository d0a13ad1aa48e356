"""Files of prompts: one a line, or in a .jsonl file an object with a "prompt" a line."""

import json
from pathlib import Path

from calm_core.errors import CalmError

LARGEST = 1 << 28
"""Bytes of a file of prompts, at most."""

JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_prompts(path: Path) -> list[str]:
    """The prompts in ``path``, in their order. An empty line is an empty prompt, in JSON lines it is none.

    Lines end at a line feed, with or without a carriage return before it, and at nothing else: the other characters at
    which Python's `splitlines` splits may stand in any text, in a JSON string too.

    Raises:
        CalmError: the file is too large, no UTF-8, holds no prompt, or in JSON lines something else; names the line.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise CalmError(f"{path} has more than {LARGEST:,} bytes; split it")
    try:
        text = content.decode("utf-8-sig")  # without the mark that some editors put at the beginning
    except UnicodeDecodeError as error:
        # The error counts bytes behind that mark.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise CalmError(f"{path}, line {line} is not UTF-8 text; save the file as UTF-8") from None
    lines = text.split("\n")
    if not lines[-1]:  # what follows the last line's end
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    if path.suffix.lower() in JSON_LINES:
        lines = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip(" \t")]
    if not lines:
        raise CalmError(f"{path} holds no prompt")
    return lines


def require_utf8(prompt: str, place: str) -> str:
    """``prompt``; raises CalmError if it is not text, as bytes of a command line or half a pair of surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise CalmError(f"{place} is not UTF-8 text: {prompt!r}") from None
    return prompt


def _prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise CalmError(f'{place} is no object with a prompt: {{"prompt": "..."}}')
    return require_utf8(prompt, place)
