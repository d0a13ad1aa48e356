"""Several models continue one prompt at the same time, a step at a time in turn.

Notable: the next step is that of the model that has sampled for the least time so far. Each has the machine to itself
while it samples, so that none slows another, and still the texts grow as in a race: at any moment their lengths stand
in the ratio of the models' speeds. Strict alternation would show the number of tokens in a step, whatever a step takes.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from tokenizers.decoders import DecodeStream

from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import Continuation, FinishReason, LanguageModel


@dataclass(frozen=True)
class Reading:
    """Said once by each model, before it writes."""

    model: int
    """Which of the models."""
    prompt_tokens: int
    read_tokens: int
    """How many of the prompt's tokens are read, its last ones: fewer than all if it is longer than the context."""


@dataclass(frozen=True)
class Piece:
    """What a model wrote in one step, and how far it is; all numbers but ``model`` count from the prompt on."""

    model: int
    text: str
    """Characters that the step completed: none if it ended within the bytes of one."""
    tokens: int
    steps: int
    samples: int
    """Samples of the head, or tokens of a Transformer."""
    inexact_steps: int
    """Steps in which a temperature below 1 was approximated."""
    seconds: float
    """The model's own sampling time, the reading of the prompt included."""
    tokens_per_second: float
    """``tokens`` / ``seconds``."""
    finish_reason: FinishReason | None
    """None while the text goes on."""


def side_by_side(
    models: Sequence[LanguageModel],
    prompt: str,
    tokens: int,
    sampling: Sampling,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Reading | Piece, None, None]:
    """Continue ``prompt`` by at most ``tokens`` tokens with each of ``models``; ``clock`` gives seconds.

    The texts are those of ``LanguageModel.generate``, whoever writes beside. Each comes as pieces, a piece a step.

    Raises:
        CalmError: as ``LanguageModel.stream``.
    """
    writers = []
    for number, model in enumerate(models):
        token_ids = model.encode(prompt)
        yield Reading(number, len(token_ids), len(model.read_part(token_ids)))
        writers.append(_Writer(number, model, token_ids, model.stream([token_ids], tokens, sampling, seed)))
    while writers:
        writer = min(writers, key=lambda writer: writer.seconds)
        piece = writer.step(clock)
        if piece.finish_reason:
            writers.remove(writer)
        yield piece


@dataclass(eq=False)
class _Writer:
    """A model and the text that it is writing."""

    number: int
    model: LanguageModel
    prompt: list[int]
    steps: Iterator[list[Continuation]]
    seconds: float = 0.0
    taken: int = 0
    shown: int = 0
    decoder: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=False))

    def __post_init__(self) -> None:
        for token_id in self.prompt:  # some tokenizers decode a token by those before it
            self.decoder.step(self.model.tokenizer, token_id)

    def step(self, clock: Callable[[], float]) -> Piece:
        """Take a step, and time it."""
        start = clock()
        (continuation,) = next(self.steps)
        self.seconds += clock() - start
        self.taken += 1
        fresh = continuation.token_ids[self.shown :]
        self.shown = len(continuation.token_ids)
        # A token may end within a character, whose bytes are shown when it is complete.
        text = "".join(self.decoder.step(self.model.tokenizer, token_id) or "" for token_id in fresh)
        return Piece(
            model=self.number,
            text=text,
            tokens=self.shown,
            steps=self.taken,
            samples=continuation.draws,
            inexact_steps=continuation.inexact_steps,
            seconds=self.seconds,
            tokens_per_second=self.shown / self.seconds if self.seconds else 0.0,
            finish_reason=continuation.finish_reason,
        )
