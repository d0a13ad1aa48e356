"""Generation as others call it: prompts of any length, the end of a text, both samplers, and folders that are wrong."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.errors import CalmError
from calm_core.inference.decoding import SamplerName, Sampling, align_prompts
from calm_core.inference.language_model import BATCH_PROMPTS, Continuation, LanguageModel, load_language_model
from calm_core.inference.temperature import expected_draws
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.tokens.tokenizer import end_of_text_id
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.support.tiny_models import few_words, weighted

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
HEAD = EnergyHeadConfig(1, 8)
PROMPTS = [[2 + (5 * n + k) % 250 for k in range(n)] for n in range(10)]
"""Prompts of every length from 0 to 9."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return few_words()


def calm(tokenizer: Tokenizer, patch_size: int, inputs: Literal["tokens", "latents"] = "tokens") -> LanguageModel:
    """A CALM that never ends a text."""
    size = tokenizer.get_vocab_size()
    model = weighted(Calm(CalmConfig(size, patch_size, 12, BACKBONE, HEAD, inputs)), 0)
    autoencoder = weighted(Autoencoder(AutoencoderConfig(size, patch_size, 16, 24, 12)), 1)
    autoencoder.encoder.embedding.weight[end_of_text_id(tokenizer)] = 0
    return LanguageModel(model, autoencoder, tokenizer, 64)


def token_calm(tokenizer: Tokenizer, patch_size: int) -> LanguageModel:
    """A CALM with a token head that, if greedy, never ends a text."""
    size = tokenizer.get_vocab_size()
    model = weighted(Calm(CalmConfig(size, patch_size, 16, BACKBONE, TokenHeadConfig(12, 16, 1))), 0)
    model.head.unembedding.weight[end_of_text_id(tokenizer)] = 0
    return LanguageModel(model, None, tokenizer, 64)


def transformer(tokenizer: Tokenizer) -> LanguageModel:
    """A Transformer that, if greedy, never ends a text."""
    model = weighted(Transformer(TransformerConfig(tokenizer.get_vocab_size(), BACKBONE)), 0)
    model.output.weight[end_of_text_id(tokenizer)] = 0
    return LanguageModel(model, None, tokenizer, 64)


def final(
    model: LanguageModel, prompts: list[list[int]], tokens: int, sampling: Sampling, seed: int = 0
) -> list[Continuation]:
    *_, last = model.stream(prompts, tokens, sampling, seed)
    return last


class StillHead(nn.Module):
    """A head without randomness: the sample is a linear map of the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 12)

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.zeros(*shape, 12)

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        return self.map(hidden_states) + draws


def still_calm(tokenizer: Tokenizer, patch_size: int, inputs: Literal["tokens", "latents"] = "tokens") -> LanguageModel:
    model = calm(tokenizer, patch_size, inputs)
    model.model.head = weighted(StillHead(), 2)
    return model


class ScriptedAutoencoder(Autoencoder):
    """Decodes each step to the next of the patches it was given, [steps, batch, K], whatever the latents."""

    def __init__(self, config: AutoencoderConfig, script: list[list[list[int]]]) -> None:
        super().__init__(config)
        self.steps = iter(torch.tensor(script))

    def decode(self, latents: Tensor) -> Tensor:
        return next(self.steps)


def scripted(tokenizer: Tokenizer, script: list[list[list[int]]]) -> LanguageModel:
    model = calm(tokenizer, len(script[0][0]))
    return LanguageModel(model.model, ScriptedAutoencoder(model.autoencoder.config, script), tokenizer, 64)


@pytest.mark.parametrize("patch_size", [1, 3, 4])
def test_prompts_are_aligned_at_their_end(patch_size: int) -> None:
    end = 1
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[7:8]):
        aligned = align_prompts(prompts, patch_size, end)
        assert aligned.token_ids.dtype == torch.int64
        assert aligned.token_ids.shape[1] % patch_size == 0
        assert aligned.padding.min() == 0
        for row, padding, prompt in zip(aligned.token_ids.tolist(), aligned.padding.tolist(), prompts, strict=True):
            seen = row[padding * patch_size :]
            assert seen[len(seen) - len(prompt) :] == prompt
            assert set(seen[: len(seen) - len(prompt)]) <= {end}
            # No more is seen than the patches that the prompt reaches into, one at least.
            assert len(seen) - len(prompt) < patch_size or (prompt == [] and len(seen) == patch_size)


@pytest.mark.parametrize("patch_size", [1, 3, 4])
def test_before_each_prompt_stands_the_end_of_another_document(patch_size: int) -> None:
    opening = [90, 91, 92, 1][-patch_size:]
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[7:8]):
        aligned = align_prompts(prompts, patch_size, 1, opening)
        assert aligned.padding.min() == 0
        for row, padding, prompt in zip(aligned.token_ids.tolist(), aligned.padding.tolist(), prompts, strict=True):
            seen = row[padding * patch_size :]
            before = seen[: len(seen) - len(prompt)]
            assert seen[len(before) :] == prompt
            assert 1 <= len(before) <= patch_size
            assert before == opening[-len(before) :]


def hidden_states(model: LanguageModel, prompts: list[list[int]], steps: int) -> Tensor:
    """Hidden states that each step samples from, [steps, batch, hidden]."""
    seen: list[Tensor] = []
    hook = model.model.backbone.register_forward_hook(lambda _, __, output: seen.append(output[:, -1]))
    final(model, prompts, steps * model.patch_size, Sampling(1.0 if model.autoencoder else 1e-4))
    hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("sampler", ["batch", "exact", "softmax"])
def test_a_token_head_writes_exactly_at_every_temperature(
    tokenizer: Tokenizer, temperature: float, sampler: SamplerName, tmp_path: Path
) -> None:
    model = token_calm(tokenizer, 3)
    found = final(model, PROMPTS, 7, Sampling(temperature, sampler))
    assert [len(one.token_ids) for one in found if one.finish_reason == "length"]
    assert all(one.exact and one.inexact_steps == 0 and one.draws in (1, 2, 3) for one in found)
    save_model(model.model, tokenizer, tmp_path / "calm", 64)
    loaded = load_language_model(tmp_path / "calm")
    assert loaded.autoencoder is None
    texts = loaded.generate(["a few", "words, a"], tokens=7, temperature=temperature, sampler=sampler, seed=1)
    again = model.generate(["a few", "words, a"], tokens=7, temperature=temperature, sampler=sampler, seed=1)
    assert texts == again
    assert texts[0] != texts[1]


@pytest.mark.parametrize("patch_size", [3, 4])
def test_a_batch_gives_each_prompt_what_it_gets_alone(tokenizer: Tokenizer, patch_size: int) -> None:
    for model in (still_calm(tokenizer, patch_size), token_calm(tokenizer, patch_size), transformer(tokenizer)):
        together = hidden_states(model, PROMPTS, 5)
        alone = torch.cat([hidden_states(model, [prompt], 5) for prompt in PROMPTS], dim=1)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        # Every prompt is read to its end: none shares its hidden states with another.
        assert torch.cdist(together[0], together[0]).fill_diagonal_(1).min() > 0.01


@pytest.mark.parametrize("patch_size", [3, 4])
def test_every_token_of_a_prompt_is_seen(tokenizer: Tokenizer, patch_size: int) -> None:
    for model in (still_calm(tokenizer, patch_size), transformer(tokenizer)):
        prompt = PROMPTS[9]
        changed = [[*prompt[:place], 259 - prompt[place], *prompt[place + 1 :]] for place in range(len(prompt))]
        states = hidden_states(model, [prompt, *changed], 1)[0]
        assert torch.all((states[1:] - states[0]).norm(dim=-1) > 1e-3)


@pytest.mark.parametrize("patch_size", [3, 4])
def test_cache_changes_nothing_for_calm(tokenizer: Tokenizer, patch_size: int) -> None:
    model = still_calm(tokenizer, patch_size)
    continuations = final(model, PROMPTS, 6 * patch_size, Sampling())
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        assert continuation.finish_reason == "length"
        context = align_prompts([prompt], patch_size, end_of_text_id(tokenizer)).token_ids
        for _ in range(6):
            latents = model.model.head.map(model.model(context.unflatten(-1, (-1, patch_size)))[:, -1])
            context = torch.cat([context, model.autoencoder.decode(latents)], dim=-1)
        assert continuation.token_ids == context[0, -6 * patch_size :].tolist()


def test_cache_changes_nothing_for_the_transformer(tokenizer: Tokenizer) -> None:
    model = transformer(tokenizer)
    continuations = final(model, PROMPTS, 12, Sampling(1e-4))
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        context = torch.tensor([prompt or [end_of_text_id(tokenizer)]])
        for _ in range(12):
            context = torch.cat([context, model.model(context)[:, -1:].argmax(dim=-1)], dim=-1)
        assert continuation == Continuation(context[0, -12:].tolist(), "length", 12, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_calm_on_latents_reads_what_it_sampled(tokenizer: Tokenizer, temperature: float) -> None:
    model = still_calm(tokenizer, 3, "latents")
    given: list[Tensor] = []
    sampled: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    model.model.backbone.register_forward_hook(lambda _, __, states: sampled.append(model.model.head.map(states)))
    final(model, PROMPTS[5:7], 9, Sampling(temperature))
    prompts = align_prompts(PROMPTS[5:7], 3, end_of_text_id(tokenizer)).token_ids.unflatten(-1, (-1, 3))
    assert torch.equal(given[0], model.autoencoder.encode(prompts).mean)
    for before, now in itertools.pairwise(zip(given, sampled, strict=True)):
        latents = before[1][:, -1:]
        # Below temperature 1 a patch is chosen, and many latents decode to it.
        expected = latents if temperature == 1 else model.autoencoder.encode(model.autoencoder.decode(latents)).mean
        torch.testing.assert_close(now[0], expected)


def test_a_text_ends_in_the_middle_of_a_patch(tokenizer: Tokenizer) -> None:
    end = end_of_text_id(tokenizer)
    script = [
        [[5, 6, 7], [15, 16, 17], [end, 25, 26]],
        [[8, end, 9], [18, 19, 20], [27, 28, 29]],
        [[10, 11, 12], [21, 22, end], [30, 31, 32]],
        [[33, 34, 35]] * 3,
    ]
    steps = scripted(tokenizer, script).stream([[], [2], [3, 4]], 12, Sampling(), 0)
    lengths = [[len(continuation.token_ids) for continuation in continuations] for continuations in steps]
    assert lengths == [[3, 3, 0], [4, 6, 0], [4, 8, 0]]  # and no fourth step: all have ended
    assert final(scripted(tokenizer, script), [[], [2], [3, 4]], 12, Sampling()) == [
        Continuation([5, 6, 7, 8], "end_of_text", 2, 0),
        Continuation([15, 16, 17, 18, 19, 20, 21, 22], "end_of_text", 3, 0),
        Continuation([], "end_of_text", 1, 0),
    ]


def test_a_text_is_cut_where_it_was_asked_to(tokenizer: Tokenizer) -> None:
    end = end_of_text_id(tokenizer)
    script = [[[5, 6, 7]], [[8, 9, end]], [[10, 11, 12]]]
    for tokens, expected, reason, steps in [
        (1, [5], "length", 1),
        (3, [5, 6, 7], "length", 1),
        (4, [5, 6, 7, 8], "length", 2),
        (5, [5, 6, 7, 8, 9], "length", 2),
        (6, [5, 6, 7, 8, 9], "end_of_text", 2),
    ]:
        continuation = final(scripted(tokenizer, script), [[2]], tokens, Sampling())[0]
        assert continuation == Continuation(expected, reason, steps, 0)


def test_a_transformer_stops_at_the_end_of_text(tokenizer: Tokenizer) -> None:
    model = transformer(tokenizer)
    whole = final(model, [PROMPTS[5]], 12, Sampling(1e-4))[0].token_ids
    # Rename the token that comes fourth: what it was called does not matter to the model.
    end, fourth = end_of_text_id(tokenizer), whole[3]
    swap = {end: fourth, fourth: end}
    for weight in (model.model.embedding.weight, model.model.output.weight):
        weight[[end, fourth]] = weight[[fourth, end]].clone()
    prompt = [swap.get(token_id, token_id) for token_id in PROMPTS[5]]
    continuation = final(model, [prompt], 12, Sampling(1e-4))[0]
    expected = [swap.get(token_id, token_id) for token_id in whole]
    assert continuation.token_ids == expected[: expected.index(end)]
    assert len(continuation.token_ids) <= 3
    assert continuation.finish_reason == "end_of_text"


def test_text_is_a_function_of_the_seed(tokenizer: Tokenizer) -> None:
    for model in (calm(tokenizer, 3), transformer(tokenizer)):
        texts = [model.generate(["a few", "more words"], tokens=20, seed=seed) for seed in (0, 0, 1)]
        assert texts[0] == texts[1]
        assert all(first != second for first, second in zip(texts[0], texts[2], strict=True))
        assert texts[0][0] != texts[0][1]
        prompts = [tokenizer.encode(text).ids for text in ("a few", "more words")]
        ids = [continuation.token_ids for continuation in final(model, prompts, 20, Sampling())]
        assert texts[0] == tokenizer.decode_batch(ids, skip_special_tokens=False)


def test_more_prompts_than_go_together(tokenizer: Tokenizer) -> None:
    model, prompts = still_calm(tokenizer, 3), [*PROMPTS, *PROMPTS[::-1], [7]]
    assert len(prompts) > BATCH_PROMPTS
    found = list(model.continuations(prompts, 7, Sampling(), 0))
    assert found == [final(model, [prompt], 7, Sampling())[0] for prompt in prompts]
    assert list(model.continuations([], 7, Sampling(), 0)) == []


def test_batches_of_prompts_draw_numbers_of_their_own(tokenizer: Tokenizer) -> None:
    for model in (calm(tokenizer, 3), transformer(tokenizer)):
        texts = model.generate(["a few"] * 2 * BATCH_PROMPTS, tokens=20)
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1.5, math.nan])
def test_impossible_temperatures(tokenizer: Tokenizer, temperature: float) -> None:
    for model in (calm(tokenizer, 3), transformer(tokenizer)):
        with pytest.raises(CalmError, match="0 < temperature <= 1"):
            model.generate(["a few"], temperature=temperature)


def test_token_ids_that_the_model_does_not_know(tokenizer: Tokenizer) -> None:
    for model in (calm(tokenizer, 3), transformer(tokenizer)):
        size = tokenizer.get_vocab_size()
        with pytest.raises(CalmError, match=f"token {size}"):
            final(model, [[2], [3, size]], 4, Sampling())


class Coin(nn.Module):
    """A head whose latent is heads (1) with the probability that the hidden state holds."""

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(*shape, 1, generator=generator)

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        return (draws < hidden_states).float()


class CoinCalm(Calm):
    """The last token of the context, in hundredths, is the probability of heads."""

    def forward(self, inputs: Tensor, *_: object, **__: object) -> Tensor:
        return inputs[..., -1:].float() / 100


class CoinAutoencoder(Autoencoder):
    """Heads is the patch (7, 8, 9), tails the patch (7, 8, 10): patches are the symbols, not tokens."""

    def decode(self, latents: Tensor) -> Tensor:
        last = torch.where(latents > 0.5, 9, 10)
        return torch.cat([torch.full_like(last, 7), torch.full_like(last, 8), last], dim=-1)


def coin(tokenizer: Tokenizer) -> LanguageModel:
    size = tokenizer.get_vocab_size()
    model = CoinCalm(CalmConfig(size, 3, 1, BACKBONE, HEAD))
    model.head = Coin()
    return LanguageModel(model, CoinAutoencoder(AutoencoderConfig(size, 3, 16, 24, 1)), tokenizer, 64)


@pytest.mark.parametrize("temperature", [0.5, 0.4, 0.2])
def test_exact_sampler_sharpens_every_prompt_by_itself(tokenizer: Tokenizer, temperature: float) -> None:
    rows = 1000
    continuations = final(coin(tokenizer), [[60], [30]] * rows, 3, Sampling(temperature, "exact"))
    for first, heads in ((0, 0.6), (1, 0.3)):
        mine = continuations[first::2]
        probabilities = torch.tensor([heads, 1 - heads])
        power = probabilities ** (1 / temperature)
        expected = (power[0] / power.sum()).item()
        error = (expected * (1 - expected) / rows) ** 0.5
        assert sum(one.token_ids == [7, 8, 9] for one in mine) / rows == pytest.approx(expected, abs=5 * error)
        draws = torch.tensor([float(one.draws) for one in mine])
        mean = expected_draws(probabilities, temperature)
        assert draws.mean().item() == pytest.approx(mean, abs=5 * draws.std().item() / rows**0.5)
        assert all(one.inexact_steps == 0 for one in mine)
        # 2.5 is no whole number, so that the budget may have chosen among the patches.
        assert {one.exact for one in mine} == {temperature != 0.4}


def test_batch_sampler_sharpens_every_prompt_by_itself(tokenizer: Tokenizer) -> None:
    rows = 1000
    sampling = Sampling(0.5, "batch", draws=100)
    continuations = final(coin(tokenizer), [[60], [30]] * rows, 3, sampling)
    for first, expected in ((0, 0.36 / 0.52), (1, 0.09 / 0.58)):
        mine = continuations[first::2]
        error = (expected * (1 - expected) / rows) ** 0.5
        share = sum(one.token_ids == [7, 8, 9] for one in mine) / rows
        assert share == pytest.approx(expected, abs=5 * error + 0.01)  # 100 draws are close, not exact
        assert all((one.draws, one.inexact_steps) == (100, 1) for one in mine)


def test_draws_are_counted_over_steps(tokenizer: Tokenizer) -> None:
    # Without randomness all draws agree: the exact sampler needs as many as 1/T, the fewest there can be.
    model = still_calm(tokenizer, 3)
    prompts = PROMPTS[4:6]
    plain = final(model, prompts, 8, Sampling())
    assert [(one.draws, one.inexact_steps, one.exact) for one in plain] == [(3, 0, True)] * 2
    for sampling, draws, inexact in [
        (Sampling(0.5, "exact"), 2, 0),
        (Sampling(0.25, "exact"), 4, 0),
        (Sampling(0.5, "batch", draws=20), 20, 1),
        (Sampling(0.5, "exact", draws=20, budget=1), 20, 1),
    ]:
        sharpened = final(model, prompts, 8, sampling)
        assert [one.token_ids for one in sharpened] == [one.token_ids for one in plain]
        assert [(one.draws, one.inexact_steps) for one in sharpened] == [(3 * draws, 3 * inexact)] * 2
        assert [one.exact for one in sharpened] == [not inexact] * 2


@pytest.mark.parametrize("sampler", ["batch", "exact", "softmax"])
def test_real_models_sharpen(tokenizer: Tokenizer, sampler: SamplerName) -> None:
    model = calm(tokenizer, 3)
    sampling = Sampling(0.5, sampler, draws=20, budget=100, latents=5)
    first, again = (final(model, PROMPTS[:3], 7, sampling) for _ in range(2))
    assert first == again
    for continuation in first:
        assert continuation.draws >= 3 * 2
        assert 0 <= continuation.inexact_steps <= 3
        assert len(continuation.token_ids) == 7


@pytest.fixture()
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A CALM as its training writes it, beside its Transformer."""
    model = calm(tokenizer, 3)
    save_model(model.model, tokenizer, tmp_path / "calm", 64)
    save_model(model.autoencoder, tokenizer, tmp_path / "calm" / AUTOENCODER)
    save_model(transformer(tokenizer).model, tokenizer, tmp_path / "transformer", 32)
    return tmp_path


def test_saved_models_write_the_same_text(folder: Path, tokenizer: Tokenizer) -> None:
    for name, model, context, patch_size in [
        ("calm", calm(tokenizer, 3), 64, 3),
        ("transformer", transformer(tokenizer), 32, 1),
    ]:
        loaded = load_language_model(str(folder / name))
        assert (loaded.context_tokens, loaded.patch_size) == (context, patch_size)
        assert loaded.generate(["a few", ""], tokens=10) == model.generate(["a few", ""], tokens=10)
        assert not loaded.model.training


def test_prompts_go_on_behind_the_opening_that_the_folder_names(folder: Path, tokenizer: Tokenizer) -> None:
    for name, opening in (("calm", [90, 91, 1]), ("transformer", [1])):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "opening": opening}))
        loaded, plain = (load_language_model(folder / name) for _ in range(2))
        plain = replace(plain, opening=())
        for prompt in ([], [7], [7, 8], [7, 8, 9]):
            # By hand: as many patches as reach from within the opening to the end of the prompt.
            whole = [*opening[len(prompt) % loaded.patch_size :], *prompt]
            expected = hidden_states(plain, [whole], 1)
            torch.testing.assert_close(hidden_states(loaded, [prompt], 1), expected)
        for wrong in ([], [1] * 9, [10**6] * loaded.patch_size, [True] * loaded.patch_size, "abc", 3):
            (folder / name / "config.json").write_text(json.dumps({**config, "opening": wrong}))
            with pytest.raises(CalmError, match=f"opening is .* not {loaded.patch_size} token ids"):
                load_language_model(folder / name)


@pytest.mark.parametrize("opening", [(), (90, 91, 1)])
def test_of_a_prompt_longer_than_the_context_the_end_is_read(tokenizer: Tokenizer, opening: tuple[int, ...]) -> None:
    model = replace(calm(tokenizer, 3), context_tokens=12, opening=opening)
    long = [2 + (7 * place) % 200 for place in range(40)]
    for length in (9, 10, 40):
        read = model.read_part(long[:length])
        assert read == long[:length][-9:]
        assert torch.equal(hidden_states(model, [long[:length]], 1), hidden_states(model, [read], 1))
    assert not torch.equal(hidden_states(model, [long], 1), hidden_states(model, [long[:-1]], 1))


def test_errors_of_folders_are_one_line(folder: Path) -> None:
    def error_of(path: Path) -> str:
        with pytest.raises(CalmError) as caught:
            load_language_model(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no folder" in error_of(folder / "nothing")
    assert "kind 'autoencoder'" in error_of(folder / "calm" / AUTOENCODER)
    assert "config.json" in error_of(folder)
    (folder / "transformer" / "tokenizer.json").unlink()
    assert "tokenizer.json" in error_of(folder / "transformer")
    shutil.rmtree(folder / "calm" / AUTOENCODER)
    assert AUTOENCODER in error_of(folder / "calm")
    config = json.loads((folder / "calm" / "config.json").read_text())
    for values in ({**config, "kind": "banana"}, {"kind": "calm"}, [], {"model_type": "energy"}):
        (folder / "calm" / "config.json").write_text(json.dumps(values))
        error_of(folder / "calm")
    (folder / "calm" / "config.json").write_text("{")
    error_of(folder / "calm")
