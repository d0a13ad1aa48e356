"""Likelihoods as the harness asks for them, against the texts that the same models write, and against probability."""

import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.errors import CalmError
from calm_core.inference.decoding import Sampling
from calm_core.inference.harness import encoded_pair, harness_model, log_likelihood, text_until
from calm_core.inference.language_model import LanguageModel
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.storage.model_folder import save_model
from calm_core.tokens.document_marks import DocumentMarks
from calm_core.tokens.tokenizer import end_of_text_id, train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
CONTEXTS = [[], [7], [9, 5, 30], [4, 8, 100, 3, 7, 9, 21]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words, a few more"], 260)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["transformer", "K = 2", "K = 3"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LanguageModel:
    """A Transformer, or a CALM with a token head; greedy, it never ends a text."""
    size = request.param
    shape = CalmConfig(260, size, 16, BACKBONE, TokenHeadConfig(12, 16, 1))
    found: Any = Transformer(TransformerConfig(260, BACKBONE)) if size == 1 else Calm(shape)
    initialise(found, torch.Generator().manual_seed(0), embedding_std=1.0)
    found.requires_grad_(False)
    (found.output if size == 1 else found.head.unembedding).weight[end_of_text_id(tokenizer)] = 0
    return LanguageModel(found.eval(), None, tokenizer, 24, (5, 6, 1)[-size:])


@pytest.mark.parametrize(("context", "already"), [([], []), ([4, 8, 100, 3, 7, 9, 21], [11, 12])])
def test_probabilities_of_all_next_tokens_sum_to_one(
    model: LanguageModel, context: list[int], already: list[int]
) -> None:
    base, _ = log_likelihood(model, context, already)
    following = [log_likelihood(model, context, [*already, token])[0] - base for token in range(260)]
    assert sum(map(math.exp, following)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_the_likeliest_text_is_the_one_that_is_written(model: LanguageModel, context: list[int]) -> None:
    (written,) = model.continuations([context], 7, Sampling(1e-4), 0)
    likelihood, likeliest = log_likelihood(model, context, written.token_ids)
    assert likeliest
    for place in range(7):
        other = list(written.token_ids)
        other[place] = (other[place] + 1) % 250 + 2
        less, is_likeliest = log_likelihood(model, context, other)
        assert not is_likeliest
        assert place < 6 or less < likelihood


def test_a_token_comes_as_often_as_it_is_likely(model: LanguageModel) -> None:
    context, count = [9, 5, 30], 400
    drawn = Counter(tuple(text.token_ids) for text in model.continuations([context] * count, 1, Sampling(1.0), 0))
    for token_ids, times in drawn.most_common(3):
        probability = math.exp(log_likelihood(model, context, token_ids)[0])
        assert abs(times / count - probability) < 4 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("opening", [True, False])
def test_a_model_whose_documents_begin_with_a_token(model: LanguageModel, opening: bool) -> None:
    """As ``stream`` reads prompts: they begin with that token, and it is what fills an open place."""
    marked = replace(model, marks=DocumentMarks((8,)), opening=model.opening if opening else ())
    context, following = encoded_pair(marked, "a few", " words")
    assert context == [8, *model.encode("a few")]
    for before in (context, context[:-1]):
        # None of which is an end of text, whose embedding is 0.
        (written,) = marked.continuations([before], 7, Sampling(1e-4), 0)
        assert written.finish_reason == "length"
        _, likeliest = log_likelihood(marked, before, written.token_ids)
        assert likeliest
        plain = replace(marked, marks=None)
        same = opening or len(before) % model.patch_size == 0
        assert (log_likelihood(plain, before, following) == log_likelihood(marked, before, following)) == same


def test_a_long_text_is_scored_in_pieces_with_what_fits_before_them(model: LanguageModel) -> None:
    size = model.patch_size
    text = [2 + (37 * place) % 250 for place in range(60)]
    at_once = (24 - 2 * size) // size * size
    pieces = range(0, 60, at_once)
    parts = [log_likelihood(model, text[:first], text[first : first + at_once])[0] for first in pieces]
    assert log_likelihood(model, [], text)[0] == pytest.approx(sum(parts), rel=1e-6)
    # What is too far back is not read.
    assert log_likelihood(model, text[:40], [9])[0] == log_likelihood(model, [3, 4, 5, *text[:40]], [9])[0]


def test_spaces_between_context_and_continuation_are_scored(model: LanguageModel) -> None:
    before, after = encoded_pair(model, "a few  ", "words")
    assert (model.decode(before), model.decode(after)) == ("a few", "  words")
    assert encoded_pair(model, "", "a few")[0] == []


def test_texts_end_before_the_first_stop(model: LanguageModel) -> None:
    whole = text_until(model, "a few", {"max_gen_toks": 12})
    (greedy,) = model.generate(["a few"], tokens=12, temperature=1e-4)
    assert whole == greedy
    words = [whole[5:7], "absent", whole[3:5]]
    before = re.split("|".join(map(re.escape, words)), whole)[0]
    assert text_until(model, "a few", {"max_gen_toks": 12, "until": ["", *words]}) == before != whole
    assert text_until(model, "a few", {"max_gen_toks": 12, "until": whole[4]}) == whole.partition(whole[4])[0]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    assert text_until(model, "a few", sampled, seed=3) == model.generate(["a few"], tokens=12, seed=3)[0]
    plain = sampled | {"top_p": 1.0, "top_k": 0, "num_beams": 1}
    assert text_until(model, "a few", plain, seed=3) == text_until(model, "a few", sampled, seed=3)
    assert text_until(model, "a few", {"max_gen_toks": 12, "top_p": 0.9}) == whole
    for wanted, told in (({"do_sample": True, "top_p": 0.9}, "top_p"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(CalmError, match=f"the task wants {told}; here"):
            text_until(model, "a few", wanted)


def test_the_harness_gets_its_three_methods(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = Transformer(TransformerConfig(260, BACKBONE))
    initialise(transformer, torch.Generator().manual_seed(0), embedding_std=1.0)
    save_model(transformer, tokenizer, tmp_path / "model", 24, [1])
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CalmError, match="lm-evaluation-harness is not installed"):
        harness_model(tmp_path / "model")
    # Of the harness, which would bring dozens of packages, the base class alone is needed.
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", type("LM", (), {}), raising=False)
    found = harness_model(tmp_path / "model")
    asked = SimpleNamespace(args=("a few", " words"))
    ((likelihood, likeliest),) = found.loglikelihood([asked])
    assert likelihood < 0 and likeliest is False
    (whole,) = found.loglikelihood_rolling([SimpleNamespace(args=("a few words",))])
    (start,) = found.loglikelihood_rolling([SimpleNamespace(args=("a few",))])
    assert whole - start == pytest.approx(likelihood, abs=1e-4)
    (text,) = found.generate_until([SimpleNamespace(args=("a few", {"until": ["\n"], "max_gen_toks": 5}))])
    assert isinstance(text, str)
    # Asked several times, as tasks that count right answers among k do, it has several answers.
    again = SimpleNamespace(args=("a few", {"do_sample": True, "max_gen_toks": 8}))
    assert len(set(found.generate_until([again] * 4))) == 4


def test_a_bound_is_no_likelihood(tokenizer: Tokenizer) -> None:
    calm = Calm(CalmConfig(260, 2, 12, BACKBONE, EnergyHeadConfig(1, 8)))
    with pytest.raises(CalmError, match="a head of kind 'energy' has a bound"):
        log_likelihood(LanguageModel(calm, None, tokenizer, 24), [5], [6])
