"""BrierLM of a CALM as the reference implementation measures it, which is what the published figures are of.

What its evaluation does (``--do_eval`` of its training script, ``eval_brier`` of its models):

- documents are what the tokenizer makes of them, joined 1,000 at a time and cut in blocks of 8192 tokens; what is left
  over of each 1,000 is dropped;
- at every patch of a block but the first, two samples of it are drawn given the true patches before it; their first
  four tokens give Brier-1 to Brier-4 by the paper's estimator (section 4);
- scores are averaged over a block, then over blocks, which all have as many; BrierLM is the fourth root of the product,
  0 if that is negative.

Here in float32, where its script has bf16. Beside it stands how many tokens come back from the autoencoder, which the
reference does not count: of the mean of a patch's latent, and of a sample of it, as its autoencoder is evaluated.

Notable:
- a block is a function of the text, the model, the seed and its number, and is on disk once it is done: a killed run
  goes on with the next one, to the same bytes;
- the interval is this project's own, over documents (``evaluation.intervals``); there is none where a mean is below 0.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.errors import CalmError
from calm_core.evaluation.brier import brier_from_samples, by_document, per_document
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.inference.evaluate_corpus import (
    BOOTSTRAP_RESAMPLES,
    UNFINISHED,
    corpus_tokens,
    require_free,
    write_results,
)
from calm_core.inference.language_model import LanguageModel
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import read_json, write_json
from calm_core.tokens.blocks import MAX_TOKENS
from calm_core.tokens.shards import TokenStream

PROTOCOL = "reference"
"""How the option, the results and the draws call it."""

BLOCK_TOKENS = 8192
JOINED_DOCUMENTS = 1000
SAMPLES = 2


def evaluate_by_reference(
    language_model: LanguageModel,
    spec: str,
    folder: Path,
    tokens: int | None = None,
    seed: int = 0,
    text_field: str = "text",
) -> dict[str, Any]:
    """Score a CALM on the corpus ``spec`` and write ``folder`` as ``evaluate_corpus`` does; returns its brierlm.json.

    ``tokens`` limits how much of the corpus is looked at. While it runs, ``folder`` holds the blocks that are done.

    Raises:
        CalmError: as ``evaluate_corpus`` does, or the model is none that the protocol can measure.
    """
    require_free(folder)
    autoencoder = _measurable(language_model)
    if language_model.context_tokens < BLOCK_TOKENS:
        context = f"the model was trained with a context of {language_model.context_tokens:,} tokens"
        print(f"reference protocol: {context}; blocks have {BLOCK_TOKENS:,}", file=sys.stderr, flush=True)
    with corpus_tokens(language_model, spec, text_field, tokens) as (stream, beginnings):
        starts = block_starts(stream.document_ends)
        there = min(len(stream), tokens or len(stream))
        starts = starts[starts + BLOCK_TOKENS <= there]
        if not len(starts):
            asked = "use more text" if there == len(stream) else f"--tokens {BLOCK_TOKENS} is the least"
            raise CalmError(f"{spec}: {there:,} tokens hold no block of {BLOCK_TOKENS:,}; {asked}")
        blocks = _measured_blocks(language_model, autoencoder, stream, starts, folder, seed)
    table = pl.concat(block.documents for block in blocks)
    table = table.group_by("document", maintain_order=True).agg(pl.all().sum())
    score = estimate_brierlm([table], BOOTSTRAP_RESAMPLES, generator(seed, PROTOCOL, "bootstrap"))
    count = len(starts) * BLOCK_TOKENS
    results = {
        "corpus": spec,
        "protocol": PROTOCOL,
        **score._asdict(),
        "brierlm": brierlm_of(score.brier),
        # Two means below 0 make a score by the reference's formula; the interval is of this project's, which is 0.
        "brierlm_ci95": score.brierlm_ci95 if min(score.brier) >= 0 else None,
        "blocks": len(starts),
        "tokens": count,
        "reconstruction_of_mean": sum(block.rebuilt_of_mean for block in blocks) / count,
        "reconstruction_of_sample": sum(block.rebuilt_of_sample for block in blocks) / count,
        "context_tokens": BLOCK_TOKENS,
        "samples": SAMPLES,
        "seed": seed,
        "device": language_model.device.type,
    }
    write_results(folder, table, beginnings, results)
    return results


def block_starts(document_ends: Tensor) -> Tensor:
    """Where blocks begin in documents that end at ``document_ends`` [documents], [blocks] int64.

    Each ``JOINED_DOCUMENTS`` of them are cut by themselves, and what is left over is in no block (``group_texts``).
    """
    ends = document_ends[JOINED_DOCUMENTS - 1 :: JOINED_DOCUMENTS].tolist()
    if len(document_ends) % JOINED_DOCUMENTS:
        ends.append(int(document_ends[-1]))
    found: list[int] = []
    for start, end in zip([0, *ends], ends, strict=False):
        found += range(start, end - BLOCK_TOKENS + 1, BLOCK_TOKENS)
    return torch.tensor(found, dtype=torch.int64)


@torch.no_grad()
def block_scores(
    model: Calm, autoencoder: Autoencoder, token_ids: Tensor, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scores of one block of ``token_ids`` [tokens], which are on the device of the model and of ``draws``.

    Returns Brier-1 to Brier-4 of each patch but the first, [patches - 1, 4] float32, and whether the autoencoder gives
    each token back, of the latents' means and of samples of the posterior, [2, patches, K] bool.
    """
    patches = token_ids.view(1, -1, model.config.patch_size)
    hidden_states = model(model.inputs(patches[:, :-1], autoencoder))
    noise = model.latent_head.sampling_draws((SAMPLES, *hidden_states.shape[:2]), draws)
    # Some patches at a time: 4 x 8192 positions of 128,257 logits would be 17 GB.
    sampled = autoencoder.decode(model.latent_head.sample(hidden_states, noise))
    brier = brier_from_samples(sampled[..., :MAX_TOKENS], patches[:, 1:, :MAX_TOKENS])
    posterior = autoencoder.encode(patches)
    noise = torch.randn(posterior.mean.shape, generator=draws, device=draws.device)
    rebuilt = autoencoder.decode(torch.stack([posterior.mean, posterior.sample(noise)]))
    return brier[0], (rebuilt == patches)[:, 0]


def brierlm_of(brier: Sequence[float]) -> float:
    """100 times the fourth root of the product of Brier-1 to Brier-4, 0 if that is negative.

    Two negative ones make a positive product, unlike in ``evaluation.brier.brierlm``: so does the reference.
    """
    return 100 * max(math.prod(brier), 0.0) ** (1 / MAX_TOKENS)


class _Block(NamedTuple):
    """What one block gave."""

    documents: pl.DataFrame
    """Sums of scores by document, as ``evaluation.brier.by_document`` gives them."""
    rebuilt_of_mean: int
    rebuilt_of_sample: int
    """Tokens that the autoencoder gives back."""


def _measured_blocks(
    language_model: LanguageModel,
    autoencoder: Autoencoder,
    stream: TokenStream,
    starts: Tensor,
    folder: Path,
    seed: int,
) -> list[_Block]:
    """All blocks, those before the last one on disk from there."""
    model, device = language_model.model, language_model.device
    assert isinstance(model, Calm)
    key = _key(model, autoencoder, stream, starts, seed, device)
    done = _finished(folder / UNFINISHED, key)
    leaves = torch.arange(model.config.patch_size, BLOCK_TOKENS, model.config.patch_size)
    with progress("reference protocol", len(starts), "blocks", len(done)) as advance:
        for number in range(len(done), len(starts)):
            start = int(starts[number])
            token_ids = stream.slice(start, BLOCK_TOKENS).to(device)
            # Keyed by the block, so that it draws the same numbers whatever was measured before it.
            brier, rebuilt = block_scores(
                model, autoencoder, token_ids, generator(seed, PROTOCOL, number, device=device)
            )
            document = torch.searchsorted(stream.document_ends, start + leaves, right=True)
            table = by_document(per_document(document, torch.zeros_like(document), brier.cpu()))
            done.append({"documents": table.to_dict(as_series=False), "rebuilt": rebuilt.sum(dim=(1, 2)).tolist()})
            write_json(folder / UNFINISHED, {"key": key, "blocks": done})
            advance()
    return [_Block(pl.DataFrame(block["documents"]), *block["rebuilt"]) for block in done]


def _finished(path: Path, key: str) -> list[dict[str, Any]]:
    """What ``path`` holds of an evaluation with this ``key``; that of another one is left out, with a word."""
    if not path.exists():
        return []
    try:
        found = read_json(path)
    except CalmError:
        found = None
    if not isinstance(found, dict) or found.get("key") != key:
        print(
            f"reference protocol: {path} is damaged or of another model, text, seed or device; it is begun anew",
            file=sys.stderr,
            flush=True,
        )
        return []
    return list(found["blocks"])


def _key(
    model: Calm, autoencoder: Autoencoder, stream: TokenStream, starts: Tensor, seed: int, device: torch.device
) -> str:
    """SHA-256 of all that the scores of a block depend on."""
    digest = hashlib.sha256(repr((torch.__version__, BLOCK_TOKENS, SAMPLES, seed, device.type)).encode())
    for part in (model, autoencoder):
        digest.update(repr(part.config).encode())
        for name, weight in part.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy().data)
    digest.update(stream.document_ends.numpy().data)
    for start in starts.tolist():
        digest.update(stream.slice(start, BLOCK_TOKENS).numpy().data)
    return digest.hexdigest()


def _measurable(language_model: LanguageModel) -> Autoencoder:
    """The model's autoencoder; raises CalmError if the protocol has no way to measure the model."""
    model, autoencoder = language_model.model, language_model.autoencoder
    otherwise = "without --protocol reference it is measured, in blocks as it was trained"
    if not isinstance(model, Calm) or isinstance(model.head, TokenHead):
        kind = "a CALM with a token head" if isinstance(model, Calm) else "a Transformer"
        raise CalmError(f"the reference's protocol asks for two latents a patch, and {kind} has none; {otherwise}")
    patch_size = model.config.patch_size
    if patch_size < MAX_TOKENS or BLOCK_TOKENS % patch_size:
        raise CalmError(
            f"the model's K is {patch_size}; the reference's protocol takes {MAX_TOKENS} tokens of one patch, so K is "
            f"{MAX_TOKENS} or more and divides {BLOCK_TOKENS}; {otherwise}"
        )
    assert autoencoder is not None
    return autoencoder
