"""Starts of held-out documents as prompts, against the same starts behind what really stood before them.

Needs a finished run: data/tokens and models/. Sampled, so that both models are asked alike: how often the first token
of a continuation is that of the text.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Result
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream

DOCUMENTS, LONGEST = 2000, 8
"""Prompts of 0 to ``LONGEST`` tokens."""

BEFORE = 64
"""Tokens of the text before a prompt: 240 help no more."""


def short_prompts() -> list[Result]:
    """A row a model."""
    tokens = TokenStream(Path("data/tokens"), "test")
    rows = []
    for name in ("calm", "transformer"):
        model = load_language_model(Path("models", name))
        starts = _starts(tokens)
        alone = [_right(model, tokens, starts, 0, length) for length in range(LONGEST + 1)]
        # Whole patches, before which nothing stands.
        plain = replace(model, opening=())
        behind = [
            _right(plain, tokens, starts, BEFORE + (-BEFORE - length) % model.patch_size, length)
            for length in range(LONGEST + 1)
        ]
        details = {"right_alone": alone, "right_behind_text": behind}
        worst = min(found / expected for found, expected in zip(alone, behind, strict=True))
        yardstick = "behind the text before it"
        rows.append(
            Result(f"{name}: worst prompt of 0 to {LONGEST} tokens", yardstick, worst, "as right", ">=", 0.8, details)
        )
    return rows


def _starts(tokens: TokenStream) -> Tensor:
    """Where documents begin that are long enough and have enough text before them."""
    ends = tokens.document_ends
    fitting = (ends.diff() > LONGEST + 1) & (ends[:-1] > 2 * BEFORE)
    starts = ends[:-1][fitting]
    return starts[torch.randperm(len(starts), generator=generator(0, "short_prompts"))[:DOCUMENTS]]


def _right(model: LanguageModel, tokens: TokenStream, starts: Tensor, before: int, length: int) -> float:
    """Share of continuations that go on as the text does after ``length`` tokens, behind ``before`` of the text."""
    right = 0
    windows = tokens.windows(starts - before, before + length + 1)
    continuations = model.continuations(windows[:, :-1].tolist(), 1, Sampling(), 0)
    for one, token in zip(continuations, windows[:, -1].tolist(), strict=True):
        right += one.token_ids == [token]
    return right / len(windows)
