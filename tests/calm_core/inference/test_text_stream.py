"""Texts end before the first place where a stop text begins, whatever tokens it is made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from calm_core.errors import CalmError
from calm_core.inference.text_stream import TextStream, stop_texts, text_after
from calm_core.tokens.tokenizer import train_tokenizer
from tests.calm_core.tokens.published import PUBLISHED

TOKENIZERS = {size: train_tokenizer(["abab cabab ää 漢字 ababc"], size) for size in (258, 275)}
"""Of single bytes, and with some longer tokens."""

TEXTS = st.text(st.sampled_from("abc ä漢\n"), max_size=14)
STOPS = st.lists(st.text(st.sampled_from("abc ä漢\n"), min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@given(TEXTS, STOPS, st.sampled_from(sorted(TOKENIZERS)), st.integers(1, 4), st.binary(max_size=2))
def test_a_text_is_what_all_its_tokens_say_up_to_the_first_stop_text(
    text: str, stops: list[str], size: int, at_once: int, tail: bytes
) -> None:
    """``tail`` is bytes of which some characters may be missing."""
    tokenizer = TOKENIZERS[size]
    alphabet = {token: token_id for token, token_id in tokenizer.get_vocab().items() if len(token) == 1}
    written = tokenizer.encode(text).ids + [alphabet[chr(byte)] for byte in tail if 33 <= byte <= 126]
    written += tokenizer.encode("漢").ids[: len(tail)] if size == 258 else []
    whole = tokenizer.decode(written, skip_special_tokens=False)
    expected = cut(whole, stops)
    stream, shown = TextStream(tokenizer, [], stops), ""
    for end in range(at_once, len(written) + at_once, at_once):
        stream.read(written[:end])
        # What was shown stays, and nothing of the stop text was.
        assert stream.settled.startswith(shown)
        assert expected.startswith(stream.settled)
        shown = stream.settled
        # Nothing is held back but an unfinished character and what may begin a stop text.
        held = tokenizer.decode(written[:end], skip_special_tokens=False).rstrip("�")[len(shown) :]
        if not stream.stopped:
            assert held == "" or any(stop.startswith(held) or held in stop for stop in stops)
        else:
            break
    else:
        stream.finish()
    assert stream.settled == expected
    assert stream.stopped == (expected != whole)
    # The fewest tokens that hold the text.
    assert tokenizer.decode(written[: stream.tokens], skip_special_tokens=False).startswith(expected)
    if stream.tokens:
        less = tokenizer.decode(written[: stream.tokens - 1], skip_special_tokens=False).rstrip("�")
        assert len(less) < len(expected)


def read(tokenizer: Tokenizer, tokens: list[str], stops: list[str]) -> list[str]:
    """The settled text after each of ``tokens``, and at the end."""
    stream, found = TextStream(tokenizer, [], stops), []
    token_ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in token_ids
    for end in range(1, len(token_ids) + 1):
        stream.read(token_ids[:end])
        found.append(stream.settled)
        if stream.stopped:
            return found
    stream.finish()
    return [*found, stream.settled]


def test_what_may_begin_a_stop_text_waits() -> None:
    tokenizer = TOKENIZERS[258]
    assert read(tokenizer, list("xabab"), ["abc"]) == ["x", "x", "x", "xab", "xab", "xabab"]
    assert read(tokenizer, list("xababc"), ["abc"]) == ["x", "x", "x", "xab", "xab", "xab"]
    # The first place counts, and not which is whole first.
    assert read(tokenizer, list("abcd"), ["abcd", "bc"]) == ["", "", "", ""]
    assert read(tokenizer, list("abcx"), ["abcd", "bc"]) == ["", "", "", "a"]
    assert read(tokenizer, list("abc"), ["abcd", "bc"]) == ["", "", "", "a"]
    assert read(tokenizer, list("ab"), []) == ["a", "ab", "ab"]


def test_a_stop_text_within_the_bytes_of_tokens() -> None:
    tokenizer = TOKENIZERS[258]
    bytes_of_text = [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode("a漢ä").ids]
    assert len(bytes_of_text) == 1 + 3 + 2
    assert read(tokenizer, bytes_of_text, ["漢"]) == ["a"] * 4
    assert read(tokenizer, bytes_of_text, ["ä"]) == ["a"] * 3 + ["a漢"] * 3
    # A character that shares its first bytes with the stop text, and one whose end is missing.
    assert read(tokenizer, bytes_of_text[:4], ["漣"]) == ["a"] * 3 + ["a漢"] * 2
    assert read(tokenizer, bytes_of_text[:3], ["漢"]) == ["a"] * 3 + ["a�"]


def test_a_stop_text_in_the_middle_of_a_token() -> None:
    tokenizer = train_tokenizer(["abcd abcd abcd"] * 9, 270)
    token_ids = tokenizer.encode("abcd abcd").ids
    stream = TextStream(tokenizer, [], ["cd a"])
    stream.read(token_ids)
    assert (stream.settled, stream.stopped) == ("ab", True)
    assert tokenizer.decode(token_ids[: stream.tokens]).startswith("ab")
    assert stream.tokens == 1


def test_a_character_that_begins_before_the_text() -> None:
    tokenizer = TOKENIZERS[258]
    token_ids = tokenizer.encode("a漢b").ids
    for place in range(6):
        stream = TextStream(tokenizer, token_ids[:place])
        stream.read(token_ids[place:])
        assert stream.settled == ("a漢b", "漢b", "漢b", "漢b", "b", "")[place]
        assert text_after(tokenizer, token_ids[:place], token_ids[place:]) == stream.settled
    # And one that never ends.
    first, after = token_ids[1], [*token_ids[2:3], *tokenizer.encode("b").ids]
    stream = TextStream(tokenizer, [first])
    stream.read(after)
    stream.finish()
    assert text_after(tokenizer, [first], after) == stream.settled


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_texts_of_other_tokenizers_follow_their_prompt(name: str) -> None:
    """Joined, prompt and text are what all tokens say together."""
    tokenizer = PUBLISHED[name]()
    token_ids = tokenizer.encode("The quick brown fox jumps over", add_special_tokens=False).ids
    half = len(token_ids) // 2
    before, after = token_ids[:half], token_ids[half:]
    stream = TextStream(tokenizer, before)
    for end in range(1, len(after) + 1):
        stream.read(after[:end])
    stream.finish()
    assert tokenizer.decode(before) + stream.settled == tokenizer.decode(token_ids)
    assert text_after(tokenizer, before, after) == stream.settled


def test_an_empty_stop_text_is_refused() -> None:
    for empty in (["a", ""], [""]):
        with pytest.raises(CalmError, match="a stop text is empty"):
            stop_texts(empty)
    assert stop_texts("ab") == ("ab",)
    assert stop_texts(()) == ()
