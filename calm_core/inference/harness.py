"""Models here as lm-evaluation-harness asks them: likelihoods of continuations, and texts up to a stopping word.

    lm_eval.simple_evaluate(harness_model("models/calm"), tasks=["lambada_openai"])

Notable:
- likelihoods are exact, of the distribution that ``LanguageModel.stream`` samples from at temperature 1: with the same
  opening before the context, whose last token ends a patch;
- so they are of a Transformer and of a CALM with a token head. One that samples latents knows but a bound
  (``evaluation.likelihood``): a task that asks which of two answers is likelier would compare the gaps of two bounds,
  so it is refused;
- one text at a time: for tasks of some thousand questions and models of the size of the default run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_core.calm.token_head import TokenHead
from calm_core.errors import CalmError
from calm_core.inference.decoding import Sampling, align_prompts
from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.runtime.device import DeviceName
from calm_core.transformer.model import Transformer

GREEDY = 1e-4
"""The temperature that stands for 0: two logits are told apart that differ by a thousandth."""

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_beams": 1}
"""Settings of a task that no sampler here has, with the values that change nothing."""

MOST_TOKENS = 256
"""Tokens of a text where a task does not say how many, as in the harness."""


def harness_model(name: str | Path, device: DeviceName = "cpu", seed: int = 0) -> Any:
    """The model ``name``, a folder or a name on the hub, as an ``lm_eval.api.model.LM``.

    ``seed`` is that of texts which a task wants sampled.

    Raises:
        CalmError: the package lm_eval is not installed; the model cannot be loaded, or has no exact likelihood.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise CalmError("lm-evaluation-harness is not installed; `pip install lm_eval` installs it") from None
    language_model = load_language_model(name, device)
    _require_likelihood(language_model)

    class CalmModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [encoded_pair(language_model, *request.args) for request in requests]
            return [log_likelihood(language_model, *pair) for pair in pairs]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            pairs = [encoded_pair(language_model, "", request.args[0]) for request in requests]
            return [log_likelihood(language_model, *pair)[0] for pair in pairs]

        def generate_until(self, requests: list[Any]) -> list[str]:
            # Each with draws of its own: a task may ask the same question several times, for different answers.
            asked = enumerate(request.args for request in requests)
            return [text_until(language_model, context, settings, seed + place) for place, (context, settings) in asked]

    return CalmModel()


def encoded_pair(language_model: LanguageModel, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of ``context`` and of what ``continuation`` adds to them; spaces between the two are the latter's."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole, before = language_model.encode(context + continuation), language_model.encode(context)
    return whole[: len(before)], whole[len(before) :]


@torch.no_grad()
def log_likelihood(
    language_model: LanguageModel, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """log p(``continuation`` | ``context``) in nats, of token ids, and whether each token is the likeliest there.

    What does not fit into the model's context is scored in pieces, each with as much before it as fits.

    Raises:
        CalmError: the model has no exact likelihood.
    """
    _require_likelihood(language_model)
    patch_size, size = language_model.patch_size, language_model.context_tokens
    # Beside a piece there is room for the opening and the patch before it.
    at_once = max(patch_size, (size - 2 * patch_size) // patch_size * patch_size)
    total, likeliest = 0.0, True
    for first in range(0, len(continuation), at_once):
        piece = list(continuation[first : first + at_once])
        before = [*context, *continuation[:first]]
        # The opening takes a place at least, and what is left of a patch.
        room = size - -(-len(piece) // patch_size) * patch_size - 1
        logits = _logits(language_model, before[max(0, len(before) - room) :], piece)
        token_ids = torch.tensor(piece, device=logits.device)
        log_probabilities = logits.log_softmax(dim=-1).gather(-1, token_ids[:, None])
        total += float(log_probabilities.double().sum())
        likeliest &= bool((logits.argmax(dim=-1) == token_ids).all())
    return total, likeliest


def text_until(language_model: LanguageModel, context: str, settings: dict[str, Any], seed: int = 0) -> str:
    """What the model writes after ``context``, up to the first of ``settings["until"]``, without it.

    Raises:
        CalmError: the task wants the text sampled in a way that no sampler here does.
    """
    sampled = bool(settings.get("do_sample", False))
    # Where the likeliest token is taken, what would cut the others off changes nothing.
    counted = PLAIN if sampled else ("num_beams",)
    if other := [key for key in counted if settings.get(key) not in (None, PLAIN[key])]:
        raise CalmError(f"the task wants {', '.join(other)}; here a temperature in (0, 1] is all there is")
    temperature = float(settings.get("temperature", 1.0)) if sampled else 0.0
    tokens = int(settings.get("max_gen_toks") or MOST_TOKENS)
    prompt = language_model.encode(context)
    until = settings.get("until") or []
    words = [word for word in ([until] if isinstance(until, str) else until) if word]
    (found,) = language_model.continuations([prompt], tokens, Sampling(max(temperature, GREEDY)), seed, words)
    return found.text


def _require_likelihood(language_model: LanguageModel) -> None:
    model = language_model.model
    if not isinstance(model, Transformer) and not isinstance(model.head, TokenHead):
        raise CalmError(
            f"a CALM with a head of kind {model.config.head.kind!r} has a bound of its likelihood, not the likelihood "
            "that tasks compare; a Transformer and a CALM with a token head have it"
        )


def _logits(language_model: LanguageModel, before: list[int], piece: list[int]) -> Tensor:
    """Logits of each token of ``piece``, given those before it, [tokens, vocabulary] float32."""
    model, patch_size = language_model.model, language_model.patch_size
    filler = language_model.document_marks.filler
    read = align_prompts([before], patch_size, filler, language_model.opening).token_ids
    filled = torch.tensor([piece + [filler] * (-len(piece) % patch_size)])
    token_ids = torch.cat([read, filled], dim=1).to(language_model.device)
    if isinstance(model, Transformer):
        return model(token_ids[:, :-1])[0, read.shape[1] - 1 :].float()
    head = model.head
    assert isinstance(head, TokenHead)
    patches = token_ids.unflatten(-1, (-1, patch_size))
    first = read.shape[1] // patch_size
    hidden_states = model(patches[:, :-1])[0, first - 1 :]
    earlier = torch.cat([patches[0, first - 1 : -1], patches[0, first:]], dim=-1)
    logits = [head.logits(hidden_states, earlier[:, : patch_size + k]) for k in range(patch_size)]
    return torch.stack(logits, dim=1).flatten(0, 1)[: len(piece)].float()
