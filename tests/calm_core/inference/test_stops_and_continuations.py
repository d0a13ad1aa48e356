"""Texts that end at stop texts, and several of one prompt, are parts of what is written without these options."""

import pytest
from tokenizers import Tokenizer

from calm_core.errors import CalmError
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import BATCH_PROMPTS, Continuation, LanguageModel
from calm_core.tokens.tokenizer import train_tokenizer
from tests.calm_core.inference.test_language_model import calm, final, scripted, token_calm, transformer

PROMPTS = ["a few", "", "words", "a few"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words, a few more"], 280)


def models(tokenizer: Tokenizer) -> list[LanguageModel]:
    return [calm(tokenizer, 3), token_calm(tokenizer, 3), transformer(tokenizer)]


def test_a_text_ends_before_the_first_stop_text(tokenizer: Tokenizer) -> None:
    cuts = set()
    for model in models(tokenizer):
        whole = model.generate(PROMPTS, tokens=60)
        for stop in (whole[0][5:9], [whole[1][2], whole[3][-3:]], "never there", [whole[2][:2]], "e", ["w", " "]):
            stops = [stop] if isinstance(stop, str) else stop
            cut = [text[: min((text.find(one) for one in stops if one in text), default=None)] for text in whole]
            assert model.generate(PROMPTS, tokens=60, stop=stop) == cut
            prompts = [model.encode(prompt) for prompt in PROMPTS]
            for text, expected, full in zip(
                model.continuations(prompts, 60, Sampling(), 0, stop), cut, whole, strict=True
            ):
                assert text.text == expected
                assert (text.finish_reason == "stop") == (expected != full)
                assert tokenizer.decode(text.token_ids, skip_special_tokens=False).startswith(expected)
                cuts.add(len(expected))
    assert len(cuts) > 10


def test_a_stop_text_over_several_patches_ends_the_work(tokenizer: Tokenizer) -> None:
    word = [tokenizer.token_to_id(letter) for letter in "abcdefghijkl"]
    model = scripted(tokenizer, [[word[first : first + 3]] for first in range(0, 12, 3)])
    steps = [
        (text.text, text.finish_reason, len(text.token_ids))
        for (text,) in model.stream([[]], 12, Sampling(), 0, "cdefg")
    ]
    assert steps == [("ab", None, 3), ("ab", None, 6), ("ab", "stop", 2)]
    model = scripted(tokenizer, [[word[first : first + 3]] for first in range(0, 12, 3)])
    found = final_with(model, ["fgx", "il"])
    # Nothing came of what might have begun one; draws are those of all steps.
    assert (found.text, found.finish_reason, found.token_ids, found.draws) == ("abcdefghijkl", "length", word, 4)


def final_with(model: LanguageModel, stop: list[str]) -> Continuation:
    *_, (last,) = model.stream([[]], 12, Sampling(), 0, stop)
    return last


def test_the_length_and_the_end_of_a_text_count_before_a_stop_text_that_is_not_whole(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    for tokens, script, stop, expected in [
        (3, [[[a, b, c]]], "c", ("ab", "stop", [a, b])),
        (3, [[[a, b, c]]], "ca", ("abc", "length", [a, b, c])),
        (2, [[[a, b, c]]], "bc", ("ab", "length", [a, b])),
        (9, [[[a, b, 1]]], "bc", ("ab", "end_of_text", [a, b])),
        (9, [[[a, 1, b]]], "b", ("a", "end_of_text", [a])),
        (9, [[[a, b, 1]]], "a", ("", "stop", [])),
        (2, [[[a, b, c]]], ["abc", "b"], ("a", "stop", [a])),
    ]:
        *_, (found,) = scripted(tokenizer, script).stream([[]], tokens, Sampling(), 0, stop)
        assert (found.text, found.finish_reason, found.token_ids) == expected


def test_without_stop_texts_a_finished_text_is_told(tokenizer: Tokenizer) -> None:
    for model in models(tokenizer):
        for text in final(model, [model.encode(prompt) for prompt in PROMPTS], 20, Sampling()):
            assert text.text == model.decode(text.token_ids)


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_text(tokenizer: Tokenizer, stop: str | list[str]) -> None:
    model = transformer(tokenizer)
    with pytest.raises(CalmError, match="a stop text is empty"):
        list(model.stream([[2]], 4, Sampling(), 0, stop))
    with pytest.raises(CalmError, match="a stop text is empty"):
        model.generate(["a few"], stop=stop)


def test_several_texts_of_a_prompt(tokenizer: Tokenizer) -> None:
    for model in models(tokenizer):
        texts = model.generate(["a few", "words"], tokens=20, continuations=3, seed=2)
        assert len(set(texts)) == 6
        # Prompt by prompt, the first as without others; and the same as for a prompt that stands three times.
        assert [texts[0], texts[3]] == model.generate(["a few", "words"], tokens=20, seed=2)
        assert texts[:3] == model.generate(["a few"] * 3, tokens=20, seed=2)
        assert texts == model.generate(["a few", "words"], tokens=20, continuations=5, seed=2)[:3] + texts[3:]
    many = model.generate(["a few"], tokens=20, continuations=2 * BATCH_PROMPTS + 1)
    assert len(set(many)) == 2 * BATCH_PROMPTS + 1
    # A prompt that stands twice has two times as many, all different.
    assert model.generate(["a few", "a few"], tokens=20, continuations=2) == many[:4]


@pytest.mark.parametrize("count", [0, -1])
def test_no_text_of_a_prompt(tokenizer: Tokenizer, count: int) -> None:
    with pytest.raises(CalmError, match=f"{count} continuations of a prompt"):
        transformer(tokenizer).generate(["a few"], continuations=count)
