"""What a tokenizer does not give back: texts of many kinds, encoded and decoded.

A byte-level BPE gives every text back. Normalizers fold case, accents or white space, vocabularies without bytes have
an [UNK] for what they do not know, and a tokenizer without its decoder prints its own notation. A model of such tokens
can be trained, and then never writes what was lost: its user should know before, not after.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from calm_core.errors import CalmError
from calm_core.tokens.settings import part_names
from calm_core.tokens.tokenizer import encode_texts, end_of_text_id

KINDS = {
    "small letters": "the quick brown fox",
    "capital letters": "The QUICK Fox",
    "digits and punctuation": "it's 5:30, isn't it? (no.) {x: [1, 2]} <b>a & b</b> \"c\" #1 50% a_b-c/d\\e",
    "accents": "naïve Ñandú Œuvre",
    "combining accents": "cafe\u0301 n\u0303",
    "spaces in a row": "a  b   c",
    "a space at the beginning": " a",
    "a space at the end": "a ",
    "line breaks": "a\nb\n\nc\n",
    "carriage returns": "a\r\nb",
    "tabs": "\ta\tb",
    "no-break spaces": "a\u00a0b\u202fc",
    "Greek, Cyrillic, Arabic and Hindi": "λόγος слово كلمة शब्द",
    "Chinese, Japanese and Korean": "漢字 かな 한국어",
    "full-width letters, ligatures and superscripts": "Ａ ﬁ ² ½ …",
    "emoji": "😀 👩‍👩‍👧 🏳️‍🌈",
    "control characters": "a\x00b\x1bc\x7f",
    "words of 200 letters": "ab" * 100,
    "the character ▁ (U+2581)": "a▁b",
}
"""Kinds of text, each with one of it."""

LONGEST_SHOWN = 40

SAMPLE_CHARACTERS = 100_000
"""Of the corpus, how much is compared."""


def told_losses(tokenizer: Tokenizer) -> str | None:
    """One line about the kinds of text that ``tokenizer`` does not give back, with an example; None if there are none.

    Names of special tokens are a kind, too: they are text, and must not end a document.
    """
    names = {f"the text {name!r}": f"a {name} b" for name in _names_of_added(tokenizer)}
    kinds = {**KINDS, **names}
    backs, ends = _there_and_back(tokenizer, list(kinds.values()))
    lost = {kind: (text, back) for (kind, text), back in zip(kinds.items(), backs, strict=True) if back != text}
    ending = [kind for kind, ended in zip(kinds, ends, strict=True) if ended]
    told = []
    if lost:
        causes = _causes(tokenizer)
        told = [
            "it does not give every text back: {} comes back as {}".format(*_shown(*next(iter(lost.values()))))
            + (f" ({causes})" if causes else ""),
            f"lost are: {_listed(list(lost))}",
        ]
    if ending:
        told.append(f"a document ends at: {_listed(ending)}")
    if told:
        told.append("a model never writes what its tokens lose, a byte-level BPE loses nothing")
    return "; ".join(told) or None


def told_changes(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """One line about the first of ``texts``, some of a corpus, that do not come back from ``tokenizer``, or None."""
    sample = list(_first(texts))
    changed = [(t, b) for t, b, _ in zip(sample, *_there_and_back(tokenizer, sample), strict=True) if t != b]
    if not changed:
        return None
    text, back = changed[0]
    place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, place - LONGEST_SHOWN // 4)
    return (
        f"of the first {len(sample)} documents {len(changed)} do not come back from their tokens: {{}} as {{}}".format(
            *_shown(text[start:], back[start:])
        )
    )


def _there_and_back(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[str], list[bool]]:
    """Each text decoded from its token ids, and whether these hold the end of a document."""
    end_of_text = end_of_text_id(tokenizer)
    ids = [_ids(tokenizer, text) for text in texts]
    return tokenizer.decode_batch(ids, skip_special_tokens=False), [end_of_text in found for found in ids]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return list(encode_texts(tokenizer, [text])[0].ids)
    except CalmError:  # nothing comes back then, which is told; an error it is where the corpus has such a text
        return []


def _names_of_added(tokenizer: Tokenizer) -> list[str]:
    return [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]


def _first(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_CHARACTERS
    for text in texts:
        # A part of a long one: it is as good a sample.
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _causes(tokenizer: Tokenizer) -> str:
    values = json.loads(tokenizer.to_str())
    causes = [f"normalizer {name}" for name in part_names(values["normalizer"])]
    if values["decoder"] is None:
        causes.append("no decoder")
    model = values["model"]
    if (model.get("unk_token") or model.get("unk_id") is not None) and not model.get("byte_fallback"):
        causes.append("one token for all that is unknown")
    return ", ".join(causes)


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds) if len(kinds) <= 12 else f"{', '.join(kinds[:12])} and {len(kinds) - 12} more kinds"


def _shown(text: str, back: str) -> tuple[str, str]:
    """Both as they may stand in a message: short, and told apart."""
    first, second = (part if len(part) <= LONGEST_SHOWN else f"{part[:LONGEST_SHOWN]}..." for part in (text, back))
    # Composed and decomposed characters look the same.
    alike = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)
    return (ascii(first), ascii(second)) if alike else (repr(first), repr(second))
