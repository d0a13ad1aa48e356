"""The settings of a tokenizer.json that cut texts, add to them or draw at random: switched off, and told.

Libraries save with a tokenizer how it was last called: truncation to 512 tokens, padding, BPE dropout. SentencePiece
and RoBERTa put a space before every text, and their decoders take it away, also from the beginning of a continuation.
Here a text becomes its token ids, all of them and nothing else, and the ids of its parts decode to its parts.
"""

from collections.abc import Iterator
from typing import Any


def switch_off(tokenizer: dict[str, Any]) -> list[str]:
    """Change what the tokenizer.json ``tokenizer`` holds; returns the names of the settings that were on."""
    changed = [key for key in ("truncation", "padding") if tokenizer.get(key) is not None]
    for key in changed:
        tokenizer[key] = None
    model = tokenizer.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        model["dropout"] = None
        changed.append("dropout")
    if _without_prefix_space(tokenizer):
        changed.append("a space before each text")
    if stripping := [token for token in _added(tokenizer) if token.get("lstrip") or token.get("rstrip")]:
        # They take the white space beside them, which decoding does not bring back.
        for token in stripping:
            token["lstrip"] = token["rstrip"] = False
        changed.append("added tokens that strip white space")
    return changed


def _without_prefix_space(tokenizer: dict[str, Any]) -> bool:
    adding = False
    for part in _parts(tokenizer.get("pre_tokenizer")):
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"], adding = False, True
        if part.get("type") == "Metaspace":
            adding |= _never_prepends(part)
    adding |= any(part.get("type") == "Prepend" for part in _parts(tokenizer.get("normalizer")))
    tokenizer["normalizer"] = _without(tokenizer.get("normalizer"), "Prepend")
    # What takes that space away again would take a space of the text.
    for part in _parts(tokenizer.get("decoder")):
        if part.get("type") == "Metaspace":
            adding |= _never_prepends(part)
    adding |= any(part.get("type") == "Strip" for part in _parts(tokenizer.get("decoder")))
    # Without any decoder, the library would put spaces between tokens.
    tokenizer["decoder"] = _without(tokenizer.get("decoder"), "Strip", {"type": "Fuse"})
    return adding


def _never_prepends(metaspace: dict[str, Any]) -> bool:
    """Whether ``metaspace`` prepended until now; files of old versions say so by ``add_prefix_space``."""
    before = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
    metaspace.pop("add_prefix_space", None)
    metaspace["prepend_scheme"] = "never"
    return bool(before != "never")


def _without(part: Any, kind: str, instead: dict[str, Any] | None = None) -> Any:
    """``part`` of a tokenizer.json without those of type ``kind`` in it; ``instead`` if it is one itself."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == kind:
        return instead
    for inner in ("normalizers", "decoders"):
        if isinstance(part.get(inner), list):
            kept = [_without(item, kind) for item in part[inner]]
            part[inner] = [item for item in kept if item is not None]
    return part


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """``part`` and, where it is a sequence, all in it."""
    if isinstance(part, dict):
        yield part
        for inner in ("normalizers", "pretokenizers", "decoders"):
            for item in part.get(inner) or []:
                yield from _parts(item)


def part_names(part: Any) -> list[str]:
    """The types of a normalizer, say, as tokenizer.json has it: of all in a sequence."""
    return [str(item.get("type")) for item in _parts(part) if item.get("type") != "Sequence"]


def _added(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    added = tokenizer.get("added_tokens")
    return [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []


def place_added_tokens(tokenizer: dict[str, Any]) -> bool:
    """Give each added token of ``tokenizer`` the id that its file says; returns whether anything had to change.

    The library numbers those that the model does not have one after the other, from its number of entries on, whatever
    the file says: wrong where ids have gaps.
    """
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):  # a Unigram's is a list, which has no gaps
        return False
    missing = {token["content"]: token["id"] for token in _added(tokenizer) if token["content"] not in vocabulary}
    vocabulary |= missing
    return bool(missing)
