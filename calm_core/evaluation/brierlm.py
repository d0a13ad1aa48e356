"""BrierLM of both models over held-out text, a score a position, gathered by document and eighth of the block.

Both models are asked at the same places: after every patch of K tokens, what the next four tokens are. The
split is cut in blocks of the models' context, whole documents joined (paper, section 4). A batch of token ids goes to
the device of the model, which also draws the samples; scores come back to the CPU at the end.
"""

from collections.abc import Callable

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.brier import brier_from_samples, eighth_of, per_document
from calm_core.evaluation.continuations import calm_continuations, token_head_brier, transformer_brier
from calm_core.runtime.device import device_of
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.runtime.threads import side_by_side
from calm_core.tokens.blocks import MAX_TOKENS, EvaluationBlocks
from calm_core.transformer.model import Transformer, next_token_loss

STAGE = "evaluate_brierlm"


def evaluate_calm(model: Calm, autoencoder: Autoencoder | None, blocks: EvaluationBlocks, samples: int) -> pl.DataFrame:
    """Sums of Brier scores, as ``brier.per_document`` gives them, of a CALM on ``blocks``.

    ``samples`` continuations are drawn a position, 2 or more; with a token head, which needs no ``autoencoder``, they
    are prefixes of the collision term, 1 or more.
    """
    context, patch_size = blocks.context, model.config.patch_size

    def score(token_ids: Tensor, draws: torch.Generator) -> Tensor:
        if isinstance(model.head, TokenHead):
            following = -(-MAX_TOKENS // patch_size) * patch_size
            # No target lies behind the four tokens that follow: what fills the last patch has no part in any score.
            padded = F.pad(token_ids, (0, context + following - token_ids.shape[1]))
            return token_head_brier(model, padded.unflatten(-1, (-1, patch_size)), samples, draws)
        assert autoencoder is not None
        patches = token_ids[:, :context].unflatten(-1, (-1, patch_size))
        continuations = calm_continuations(model, autoencoder, patches, MAX_TOKENS, samples, draws)
        return brier_from_samples(continuations, _targets(token_ids, context, patch_size))

    models = [part for part in (model, autoencoder) if part is not None]
    return _evaluate("CALM", score, blocks, patch_size, *models)


def evaluate_transformer(model: Transformer, blocks: EvaluationBlocks, patch_size: int, samples: int) -> pl.DataFrame:
    """The same for a Transformer, at the places where a CALM of ``patch_size`` would be asked.

    ``samples`` prefixes are drawn a position, 1 or more.
    """
    # The last token of each patch: what follows it is what a CALM predicts after that patch.
    leaves = torch.arange(patch_size - 1, blocks.context, patch_size, device=device_of(model))

    def score(token_ids: Tensor, draws: torch.Generator) -> Tensor:
        return transformer_brier(model, token_ids, leaves, samples, draws)

    return _evaluate("Transformer", score, blocks, patch_size, model)


def cross_entropy(model: Transformer, blocks: EvaluationBlocks) -> float:
    """Mean cross entropy, nats a token, of a Transformer over the blocks that the Brier scores are taken on."""
    # A mean over tokens, so batches of fewer blocks count for fewer.
    device = device_of(model)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        _, token_ids = batch
        return next_token_loss(model, token_ids.to(device)) * len(token_ids)

    losses = side_by_side(loss, blocks.batches(following=1), device, model)
    return float(torch.stack(list(losses)).sum() / len(blocks.starts))


def _evaluate(
    name: str,
    score: Callable[[Tensor, torch.Generator], Tensor],
    blocks: EvaluationBlocks,
    patch_size: int,
    *models: nn.Module,
) -> pl.DataFrame:
    """Run ``score`` ([blocks, context + 4] token ids -> [blocks, positions, 4]) over all blocks, by ``models``."""
    device = device_of(models[0])
    # Where the targets begin, counted from the start of a block.
    leaves = torch.arange(patch_size, blocks.context + 1, patch_size)
    eighth = eighth_of(leaves, blocks.context)
    documents, eighths, scores = [], [], []

    def score_batch(numbered: tuple[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        number, (starts, token_ids) = numbered
        # Keyed by the batch, so that a batch draws the same numbers whatever was evaluated before it.
        draws = generator(blocks.seed, STAGE, name, number, device=device)
        return starts, score(token_ids.to(device), draws).flatten(0, 1)

    batches = enumerate(blocks.batches(following=MAX_TOKENS))
    with progress(f"BrierLM of {name}", len(blocks.starts) * blocks.context, "tokens") as advance:
        for starts, of_batch in side_by_side(score_batch, batches, device, *models):
            scores.append(of_batch)
            documents.append(blocks.documents(starts, leaves))
            eighths.append(eighth.repeat(len(starts)))
            advance(len(starts) * blocks.context)
    return per_document(torch.cat(documents), torch.cat(eighths), torch.cat(scores).cpu())


def _targets(token_ids: Tensor, context: int, patch_size: int) -> Tensor:
    """The four tokens after each patch, [blocks, patches, 4]."""
    return token_ids[:, patch_size : context + MAX_TOKENS].unfold(1, MAX_TOKENS, patch_size)
