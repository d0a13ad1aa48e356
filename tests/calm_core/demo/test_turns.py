"""Texts side by side are those of each model alone, and turns go by the time that each has taken."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from calm_core.demo.turns import Piece, Reading, side_by_side
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import Continuation, LanguageModel


@dataclass(frozen=True)
class Paced(LanguageModel):
    """A model each of whose steps takes ``cost`` seconds of ``clock``."""

    clock: Any = field(kw_only=True)
    cost: float = field(kw_only=True)

    def stream(self, *arguments: Any) -> Iterator[list[Continuation]]:
        for continuations in super().stream(*arguments):
            self.clock.now += self.cost
            yield continuations


@dataclass(frozen=True)
class Reciting(LanguageModel):
    """A model that writes the given tokens, one a step."""

    recited: list[int] = field(kw_only=True)

    def stream(self, *arguments: Any) -> Iterator[list[Continuation]]:
        continuation = Continuation()
        for token_id in self.recited:
            continuation.token_ids.append(token_id)
            continuation.finish_reason = "length" if len(continuation.token_ids) == len(self.recited) else None
            yield [continuation]


def as_class(kind: type[Any], model: LanguageModel, **more: Any) -> Any:
    return kind(model.model, model.autoencoder, model.tokenizer, model.context_tokens, model.opening, **more)


def pieces(*arguments: Any, **options: Any) -> list[Piece]:
    return [event for event in side_by_side(*arguments, **options) if isinstance(event, Piece)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("seed", [0, 3])
def test_each_text_is_what_the_model_writes_alone(
    temperature: float, seed: int, models: dict[str, LanguageModel]
) -> None:
    both = list(models.values())
    written = pieces(both, "the qu", 20, Sampling(temperature), seed)
    for number, model in enumerate(both):
        own = [piece for piece in written if piece.model == number]
        (alone,) = model.generate(["the qu"], tokens=20, temperature=temperature, seed=seed)
        # What is left of an unfinished character at the very end is not shown.
        assert "".join(piece.text for piece in own) in (alone, alone.rstrip("�"))
        assert [piece.steps for piece in own] == list(range(1, len(own) + 1))
        assert [piece.finish_reason is None for piece in own] == [True] * (len(own) - 1) + [False]
        assert own[0].tokens == model.patch_size
        (told,) = model.continuations([model.encode("the qu")], 20, Sampling(temperature), seed)
        assert (own[-1].tokens, own[-1].samples) == (len(told.token_ids), told.draws)
        # A CALM of latents has no probabilities to sharpen, the Transformer has.
        approximated = model.autoencoder is not None and temperature < 1
        assert [piece.inexact_steps for piece in own] == [piece.steps * approximated for piece in own]


def test_the_next_step_is_that_of_the_model_that_took_the_least_time(models: dict[str, LanguageModel]) -> None:
    clock = SimpleNamespace(now=0.0)
    paced = [
        as_class(Paced, models["calm"], clock=clock, cost=1.0),
        as_class(Paced, models["transformer"], clock=clock, cost=3.0),
    ]
    written = pieces(paced, "the", 90, Sampling(), 1, clock=lambda: clock.now)
    assert [piece.model for piece in written[:12]] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    for piece in written:
        cost, size = ((1.0, 3), (3.0, 1))[piece.model]
        assert piece.seconds == cost * piece.steps
        if piece.finish_reason is None:
            assert piece.tokens_per_second == pytest.approx(size / cost)


def test_the_other_goes_on_when_one_has_ended(models: dict[str, LanguageModel]) -> None:
    short = as_class(Reciting, models["transformer"], recited=[50, 51])
    long = as_class(Reciting, models["transformer"], recited=[60] * 9)
    written = pieces([short, long], "", 9, Sampling(), 0)
    assert [piece.tokens for piece in written if piece.model == 0] == [1, 2]
    assert [piece.tokens for piece in written if piece.model == 1] == list(range(1, 10))


def test_a_character_is_shown_when_its_bytes_are_there(models: dict[str, LanguageModel]) -> None:
    model = models["transformer"]
    text = "e über łazy 日本"
    recited = model.encode(text)
    written = pieces([as_class(Reciting, model, recited=recited)], "the", 99, Sampling(), 0)
    assert "".join(piece.text for piece in written) == text
    assert [piece.tokens for piece in written] == list(range(1, len(recited) + 1))
    assert [piece.text for piece in written][-6:] == ["", "", "日", "", "", "本"]


def test_what_of_a_prompt_is_read(models: dict[str, LanguageModel]) -> None:
    prompt = "~" * 30  # a token each
    events = list(side_by_side(list(models.values()), prompt, 1, Sampling(), 0))
    # The context is 24, of which a patch stands before a document.
    assert events[:2] == [Reading(0, 30, 21), Reading(1, 30, 23)]
    assert next(side_by_side([models["calm"]], "~" * 21, 1, Sampling(), 0)) == Reading(0, 21, 21)
