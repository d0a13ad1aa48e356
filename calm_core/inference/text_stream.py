"""The text of tokens as they come, up to the first of some stop texts.

Notable:
- a text ends before the first place at which a stop text begins, wherever tokens begin and end: it is
  ``text[:min(places of the stop texts)]``, found as early as it is certain;
- what may be the beginning of a stop text is not yet settled. It is if the text goes on otherwise, or ends;
- a token may end within a character, whose bytes are text when it is complete or when the text ends.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from calm_core.errors import CalmError

SEEN_BEFORE = 16
"""Tokens before the text that its decoder reads: some tokenizers decode a token by those before it."""


class TextStream:
    """What tokens say that follow the tokens ``before``; until ``stopped`` by one of the texts ``stop``."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.settled = ""
        """Text that nothing will change."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = DecodeStream(skip_special_tokens=False)
        for token_id in before[-SEEN_BEFORE:]:
            self._decoder.step(tokenizer, token_id)
        self._undecided = ""  # what may begin a stop text
        self._incomplete: list[int] = []  # tokens that end within a character
        self._ends: list[int] = []  # characters up to the end of each token that was read

    @property
    def tokens(self) -> int:
        """The fewest of the tokens read that hold the settled text."""
        return next(
            (number for number, end in enumerate([0, *self._ends]) if end >= len(self.settled)), len(self._ends)
        )

    def read(self, token_ids: Sequence[int]) -> None:
        """Go on with ``token_ids``, which begin with those that were read before."""
        pieces = []
        done = len(self.settled) + len(self._undecided)
        for token_id in token_ids[len(self._ends) :]:
            piece = self._decoder.step(self._tokenizer, token_id)
            self._incomplete = [] if piece else [*self._incomplete, token_id]
            pieces.append(piece or "")
            done += len(pieces[-1])
            self._ends.append(done)
        self._undecided += "".join(pieces)
        self._settle(self._first_opening())

    def finish(self) -> None:
        """The text ends here: what is undecided is settled, and the bytes of an unfinished character become U+FFFD."""
        if not self.stopped:
            self._undecided += self._tokenizer.decode(self._incomplete, skip_special_tokens=False)
            self._settle(len(self._undecided))

    def _settle(self, opening: int) -> None:
        """Settle what is undecided up to ``opening``, where a stop text may begin that is not yet whole."""
        places = (self._undecided.find(text) for text in self._stop)
        found = min((place for place in places if place >= 0), default=None)
        # A longer stop text that began earlier may yet become whole.
        self.stopped = found is not None and found <= opening
        end = opening if found is None else min(found, opening)
        self.settled += self._undecided[:end]
        self._undecided = "" if self.stopped else self._undecided[end:]

    def _first_opening(self) -> int:
        length = len(self._undecided)
        first = max(0, length + 1 - max(map(len, self._stop), default=0))
        places = (place for place in range(first, length) if self._begins(self._undecided[place:]))
        return next(places, length)

    def _begins(self, end: str) -> bool:
        return any(text.startswith(end) for text in self._stop)


def text_after(tokenizer: Tokenizer, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """What a ``TextStream`` that nothing stops says of ``token_ids``; decoded at once, which takes far less time."""
    before = before[-SEEN_BEFORE:]
    start = tokenizer.decode(before, skip_special_tokens=False)
    whole = tokenizer.decode([*before, *token_ids], skip_special_tokens=False)
    if whole.startswith(start) and not start.endswith("\N{REPLACEMENT CHARACTER}"):
        return whole[len(start) :]
    # A character may begin before and end here.
    stream = TextStream(tokenizer, before)
    stream.read(token_ids)
    stream.finish()
    return stream.settled


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """``stop`` as a tuple; raises CalmError if one of them is empty, for any text would end where it begins."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(texts):
        raise CalmError("a stop text is empty; name one or more characters, or none to stop at")
    return texts
