"""Stage evaluate_calm: held-out tokens and a CALM -> results/scores/calm, with its likelihood or bounds of that."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm
from calm_core.corpus.groups import read_groups
from calm_core.evaluation.brierlm import evaluate_calm
from calm_core.evaluation.likelihood import (
    SAMPLES,
    best_temperature,
    calm_surprise,
    described,
    described_bound,
    grouped,
    likelihood,
    likelihood_blocks,
    scored_bytes,
    token_head_surprise,
)
from calm_core.evaluation.scores import score_places, write_scores
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer
from stages.runner.places import RUN, Places
from stages.runner.run import run_repeatable_stage

STAGE, TOKENS = "evaluate_calm", Path("data/tokens")
GROUPS = Path("data/groups.parquet")

CHOOSING = "validation"
"""The split on which the temperature of the decoder's softmax is chosen."""

FEWER_TOKENS = 4
"""It is chosen on so many times fewer tokens than the bound is then reported on."""


def main(params: Params, places: Places = RUN) -> None:
    """Score the model on the split ``evaluation.split``, at the context it was trained with."""
    set_threads(params.runtime.threads)
    device, settings, folder = choose_device(params.runtime.device), params.evaluation, places.models / "calm"
    require_intact(TOKENS)
    require_tokenizer_of(folder, TOKENS)
    model, autoencoder = load_calm(folder)
    model.to(device)
    if autoencoder is not None:
        autoencoder.to(device)
    tokens, context = TokenStream(TOKENS, settings.split), params.calm.context_tokens
    groups = read_groups(GROUPS, settings.split, len(tokens.document_ends))
    blocks = EvaluationBlocks(tokens, context, settings.batch_sequences, settings.tokens, params.seed)
    score = partial(evaluate_calm, model, autoencoder, samples=settings.samples)
    draws = generator(params.seed, STAGE, "bootstrap")
    patch_size = model.config.patch_size
    found = score_places(score, blocks, patch_size, settings.split, groups, settings.bootstrap_resamples, draws)
    some = likelihood_blocks(blocks, settings.likelihood_tokens)
    text_bytes = scored_bytes(load_tokenizer(folder / TOKENIZER), some, patch_size)
    more: dict[str, Any]
    if autoencoder is None:
        surprise = grouped(token_head_surprise(model, some), groups)
        more = described(likelihood(surprise, text_bytes), surprise, text_bytes)
    else:
        more = _bounds(params, model, autoencoder, some, groups, text_bytes)
    write_scores(places.scores("calm"), found._replace(summary={**found.summary, **more}))


def _bounds(
    params: Params, model: Calm, autoencoder: Autoencoder, blocks: EvaluationBlocks, groups: Tensor, text_bytes: int
) -> dict[str, Any]:
    """Bounds of the likelihood of ``blocks``, and which of them is at the temperature that other text chooses."""
    settings = params.evaluation
    bounds = calm_surprise(model, autoencoder, blocks)
    choosing = bounds
    if settings.split != CHOOSING:
        there = replace(blocks, tokens=TokenStream(TOKENS, CHOOSING))
        fewer = likelihood_blocks(there, settings.likelihood_tokens // FEWER_TOKENS)
        choosing = calm_surprise(model, autoencoder, fewer, SAMPLES[-1:])
    return described_bound(grouped(bounds, groups), best_temperature(choosing), text_bytes)


if __name__ == "__main__":
    run_repeatable_stage(STAGE, main, of_calm=True)
