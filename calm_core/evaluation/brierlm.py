"""BrierLM of both models over held-out text, a score a position, gathered by document.

Both models are asked at the same places: after every patch of K tokens, what the next four tokens are. The
split is cut in blocks of the models' context, whole documents joined (paper, section 4).
"""

from collections.abc import Callable

import polars as pl
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.evaluation.brier import brier_from_samples, per_document
from calm_core.evaluation.continuations import calm_continuations, transformer_brier
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.tokens.blocks import MAX_TOKENS, require_block
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer, next_token_loss

STAGE = "evaluate_brierlm"


def evaluate_calm(
    model: Calm,
    autoencoder: Autoencoder,
    tokens: TokenStream,
    context: int,
    batch: int,
    limit: int,
    samples: int,
    seed: int,
) -> pl.DataFrame:
    """Sums of Brier scores by document, as ``brier.per_document`` gives them, of a CALM on ``tokens``.

    ``context`` tokens make a block, ``batch`` blocks go together, ``limit`` tokens are the most to look at,
    ``samples`` are drawn a position.
    """
    patch_size = model.config.patch_size

    def score(token_ids: Tensor, draws: torch.Generator) -> Tensor:
        patches = token_ids[:, :context].unflatten(-1, (-1, patch_size))
        continuations = calm_continuations(model, autoencoder, patches, MAX_TOKENS, samples, draws)
        return brier_from_samples(continuations, _targets(token_ids, context, patch_size))

    return _evaluate("CALM", score, tokens, context, patch_size, batch, limit, seed)


def evaluate_transformer(
    model: Transformer,
    tokens: TokenStream,
    context: int,
    patch_size: int,
    batch: int,
    limit: int,
    samples: int,
    seed: int,
) -> pl.DataFrame:
    """The same for a Transformer, at the places where a CALM of ``patch_size`` would be asked."""
    leaves = torch.arange(patch_size - 1, context, patch_size)

    def score(token_ids: Tensor, draws: torch.Generator) -> Tensor:
        return transformer_brier(model, token_ids, leaves, samples, draws)

    return _evaluate("Transformer", score, tokens, context, patch_size, batch, limit, seed)


@torch.no_grad()
def cross_entropy(model: Transformer, tokens: TokenStream, context: int, batch: int, limit: int) -> float:
    """Mean cross entropy, nats a token, of a Transformer over the blocks that the Brier scores are taken on."""
    starts = _block_starts(tokens, context, limit)
    losses = [next_token_loss(model, tokens.windows(some, context + 1)) * len(some) for some in starts.split(batch)]
    return float(torch.stack(losses).sum() / len(starts))


@torch.no_grad()
def _evaluate(
    name: str,
    score: Callable[[Tensor, torch.Generator], Tensor],
    tokens: TokenStream,
    context: int,
    patch_size: int,
    batch: int,
    limit: int,
    seed: int,
) -> pl.DataFrame:
    """Run ``score`` ([blocks, context + 4] token ids -> [blocks, positions, 4]) over all blocks."""
    starts = _block_starts(tokens, context, limit)
    leaves = torch.arange(patch_size, context + 1, patch_size)
    documents, scores = [], []
    with progress(f"BrierLM of {name}", len(starts) * context, "tokens") as advance:
        for number, some in enumerate(starts.split(batch)):
            draws = generator(seed, STAGE, name, number)
            scores.append(score(tokens.windows(some, context + MAX_TOKENS), draws).flatten(0, 1))
            targets = (some[:, None] + leaves).flatten()
            documents.append(torch.searchsorted(tokens.document_ends, targets, right=True))
            advance(len(some) * context)
    return per_document(torch.cat(documents), torch.cat(scores))


def _block_starts(tokens: TokenStream, context: int, limit: int) -> Tensor:
    return torch.arange(require_block(min(len(tokens), limit), context)) * context


def _targets(token_ids: Tensor, context: int, patch_size: int) -> Tensor:
    """The four tokens after each patch, [blocks, patches, 4]."""
    return token_ids[:, patch_size : context + MAX_TOKENS].unfold(1, MAX_TOKENS, patch_size)
