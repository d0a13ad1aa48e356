"""Likelihood of held-out text, in nats a token and bits a byte: exact of a Transformer, from above of a CALM.

A CALM with a token head knows its likelihood, too. The others do not:

A CALM's head has samples z of the next latent and no density. With the decoder's softmax as p(x | z), a patch x has the
probability p(x) = E[p(x | z)], and for N independent samples, by Jensen's inequality,

    E[-log mean_n p(x | z_n)] >= -log p(x),

a bound that falls with N towards the truth (Burda et al., 2016, equation 8).

Notable:
- the decoder was trained on what the encoder gives, and away from there is far too sure: one bad sample costs dozens of
  nats. softmax(logits / tau) is a p(x | z) too, so the bound holds at every tau, each of a model of its own;
- both kinds are scored on the same tokens, each once: those of a block but for its first patch, which nothing predicts;
- bits a byte do not depend on the tokenizer, as long as nobody counts the bytes of end-of-text tokens, which the text
  does not have;
- intervals are over documents, or groups of them, as positions of one are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.intervals import effective_number, half_width
from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.cross_entropy import BLOCK_LOGITS, LEAST_ROWS
from calm_core.runtime.device import device_of
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.runtime.threads import side_by_side
from calm_core.tokens.blocks import MAX_TOKENS, EvaluationBlocks
from calm_core.transformer.model import Transformer

STAGE = "likelihood"

SAMPLES = (1, 4, 16, 64)
"""N of the reported bounds; each divides the last."""

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
"""tau of the decoder's softmax; each is half of the next, see ``log_probabilities``."""

SAMPLED_AT_ONCE = 16
"""Samples a position that the head draws together, at most."""


class Surprise(NamedTuple):
    """-log p of the scored tokens."""

    document: Tensor
    """[pieces] int64, which document of the split each piece of text begins in; or which group, see ``grouped``."""
    tokens: Tensor
    """[pieces] int64, how many tokens it has."""
    nats: Tensor
    """[..., pieces] float64; of a CALM [temperatures, samples, pieces]."""


def grouped(surprise: Surprise, groups: Tensor) -> Surprise:
    """``surprise`` by groups of documents, over which intervals then are; ``groups`` is that of each, [documents]."""
    return surprise._replace(document=groups[surprise.document])


class Likelihood(NamedTuple):
    """Means of a ``Surprise``; a bound from above where that is one."""

    nats_per_token: float
    nats_per_token_ci95: list[float] | None
    """None where all is of one document or group."""
    bits_per_byte: float
    bits_per_byte_ci95: list[float] | None
    """That of nats a token, in other units."""


def likelihood_blocks(blocks: EvaluationBlocks, tokens: int) -> EvaluationBlocks:
    """Some of ``blocks`` of ``tokens`` at most, but one at least, each a batch of its own."""
    # 64 samples a position fill a batch.
    return replace(blocks, batch=1, limit=max(tokens, blocks.context + MAX_TOKENS))


def calm_surprise(
    model: Calm, autoencoder: Autoencoder, blocks: EvaluationBlocks, samples: Sequence[int] = SAMPLES
) -> Surprise:
    """Bounds of -log p of every patch of ``blocks`` but the first of each, at ``TEMPERATURES`` and ``samples``.

    The last of ``samples`` are drawn; smaller numbers of them are disjoint groups, over which the bound is averaged.
    """
    device, patch_size = device_of(model), model.config.patch_size

    def bounds(numbered: tuple[int, tuple[Tensor, Tensor]]) -> Tensor:
        number, (_, token_ids) = numbered
        draws = generator(blocks.seed, STAGE, "CALM", number, device=device)
        patches = token_ids.to(device).unflatten(-1, (-1, patch_size))
        hidden_states = model(model.inputs(patches, autoencoder))[:, :-1]
        drawn, log_p = 0, []
        while drawn < samples[-1]:
            count = min(SAMPLED_AT_ONCE, samples[-1] - drawn)
            noise = model.latent_head.sampling_draws((count, *hidden_states.shape[:2]), draws)
            latents = model.latent_head.sample(hidden_states, noise)
            log_p.append(log_probabilities(autoencoder, latents, patches[:, 1:].expand(count, -1, -1, -1)))
            drawn += count
        together = torch.cat(log_p, dim=1)
        return torch.stack([bound(together, number) for number in samples], dim=1).flatten(2)

    found = []
    batches = enumerate(blocks.batches(following=0))
    with progress("likelihood of CALM", len(blocks.starts) * blocks.context, "tokens") as advance:
        for of_batch in side_by_side(bounds, batches, device, model, autoencoder):
            found.append(of_batch)
            advance(blocks.batch * blocks.context)
    pieces = torch.arange(patch_size, blocks.context, patch_size)
    nats = torch.cat(found, dim=-1).cpu().double()
    return Surprise(blocks.documents(blocks.starts, pieces), torch.full((nats.shape[-1],), patch_size), nats)


def token_head_surprise(model: Calm, blocks: EvaluationBlocks) -> Surprise:
    """-log p of every token of ``blocks`` but those of the first patch of each, by a CALM with a token head."""
    device, patch_size, head = device_of(model), model.config.patch_size, model.head
    assert isinstance(head, TokenHead)

    def surprise(batch: tuple[Tensor, Tensor]) -> Tensor:
        patches = batch[1].to(device).unflatten(-1, (-1, patch_size))
        read, following = patches[:, :-1], patches[:, 1:]
        return -head.log_probabilities(model(read), read, following).flatten()

    found = list(side_by_side(surprise, blocks.batches(following=0), device, model))
    document = blocks.documents(blocks.starts, torch.arange(patch_size, blocks.context))
    return Surprise(document, torch.ones_like(document), torch.cat(found).cpu().double())


def transformer_surprise(model: Transformer, blocks: EvaluationBlocks, patch_size: int) -> Surprise:
    """-log p of every token of ``blocks`` that a CALM of ``patch_size`` on the same blocks would have to predict."""
    device = device_of(model)
    # A context of no more than a patch has no such token; its last then stands for them.
    first = min(patch_size, blocks.context - 1)

    def surprise(batch: tuple[Tensor, Tensor]) -> Tensor:
        token_ids = batch[1].to(device)
        logits = model(token_ids[:, :-1]).float()[:, first - 1 :]
        return F.cross_entropy(logits.flatten(0, 1), token_ids[:, first:].flatten(), reduction="none")

    found = list(side_by_side(surprise, blocks.batches(following=0), device, model))
    document = blocks.documents(blocks.starts, torch.arange(first, blocks.context))
    return Surprise(document, torch.ones_like(document), torch.cat(found).cpu().double())


def log_probabilities(autoencoder: Autoencoder, latents: Tensor, patches: Tensor) -> Tensor:
    """log p(x | z) of token ids ``patches`` [..., K], given ``latents`` [..., latent], at each of ``TEMPERATURES``.

    Returns [temperatures, ...]; the softmax is in float32. Some patches at a time, as in ``Autoencoder.decode``.
    """
    patch_size = autoencoder.config.patch_size
    at_once = rows_at_once(
        patch_size * autoencoder.config.vocabulary_size, latents.device, BLOCK_LOGITS, -(-LEAST_ROWS // patch_size)
    )
    rows, targets = latents.reshape(-1, latents.shape[-1]), patches.reshape(-1, patch_size, 1)
    found = torch.empty(len(TEMPERATURES), len(rows), device=latents.device)
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        logits = autoencoder.logits(rows[some]).float()
        top = logits.amax(dim=-1, keepdim=True)
        target = (logits.gather(-1, targets[some]) - top).squeeze(-1)
        # exp(x / tau) is the square of exp(x / (2 tau)): one exponential serves all temperatures, the highest first.
        terms = logits.sub_(top).div_(TEMPERATURES[-1]).exp_()
        for index in reversed(range(len(TEMPERATURES))):
            found[index, some] = (target / TEMPERATURES[index] - terms.sum(dim=-1).log()).sum(dim=-1)
            terms.square_()
    return found.unflatten(-1, latents.shape[:-1])


def bound(log_p: Tensor, samples: int) -> Tensor:
    """-log of the mean of p over a group of ``samples``, averaged over groups; ``log_p`` is [taus, samples, ...]."""
    # In float32: 64 terms lose none of the digits that the log probabilities have.
    return (math.log(samples) - log_p.unflatten(1, (-1, samples)).logsumexp(dim=2)).mean(dim=1)


def likelihood(surprise: Surprise, text_bytes: int) -> Likelihood:
    """Means of ``surprise``, whose ``nats`` are [pieces], of a text of ``text_bytes`` bytes.

    The interval is that of a ratio of sums over documents, by the jackknife and Student's t.
    """
    count = int(surprise.document.max()) + 1

    def by_document(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, surprise.document, values.double())

    tokens, nats = by_document(surprise.tokens), by_document(surprise.nats)
    tokens, nats = tokens[tokens > 0], nats[tokens > 0]
    mean, documents = float(nats.sum() / tokens.sum()), len(tokens)
    bits = float(nats.sum()) / (text_bytes * math.log(2))
    if documents == 1:
        return Likelihood(mean, None, bits, None)
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    variance = float((without - mean).square().sum()) * (documents - 1) / documents
    half = half_width(math.sqrt(variance), effective_number(tokens) - 1)
    # A certain model has no nats, and no spread either.
    ends = [1 - half / mean, 1 + half / mean] if mean else [1.0, 1.0]
    return Likelihood(mean, [mean - half, mean + half], bits, [end * bits for end in ends])


def scored_bytes(tokenizer: Tokenizer, blocks: EvaluationBlocks, patch_size: int) -> int:
    """Bytes of UTF-8 of the text that is scored: of each block what follows its first patch.

    Special tokens, such as the ends of texts, are none of them: they are scored, but no text has them.
    """

    def count(rows: Tensor) -> int:
        return sum(len(text.encode()) for text in tokenizer.decode_batch(rows.tolist(), skip_special_tokens=True))

    first = min(patch_size, blocks.context - 1)
    # Of the whole less the beginning: a character may have begun before what is scored.
    return sum(count(rows) - count(rows[:, :first]) for _, rows in blocks.batches(following=0))


def described(found: Likelihood, surprise: Surprise, text_bytes: int) -> dict[str, Any]:
    """``found``, the means of ``surprise``, as the files of scores have it: with how much text it is of."""
    return {
        **found._asdict(),
        "likelihood_tokens": int(surprise.tokens.sum()),
        "likelihood_bytes": text_bytes,
    }


def described_bound(surprise: Surprise, chosen: int, text_bytes: int) -> dict[str, Any]:
    """The bounds that ``calm_surprise`` found, all of them and, that of most samples at ``TEMPERATURES[chosen]`` first.

    Those at another temperature are of another model: its decoder's softmax is more or less sure.
    """

    def of(temperature: int, number: int) -> Likelihood:
        return likelihood(surprise._replace(nats=surprise.nats[temperature, number]), text_bytes)

    return {
        **described(of(chosen, -1), surprise, text_bytes),
        "decoder_temperature": TEMPERATURES[chosen],
        "likelihood_bound": [
            {
                "samples": samples,
                "decoder_temperature": temperature,
                **of(TEMPERATURES.index(temperature), SAMPLES.index(samples))._asdict(),
            }
            for temperature in TEMPERATURES
            for samples in SAMPLES
        ],
    }


def best_temperature(surprise: Surprise) -> int:
    """The index in ``TEMPERATURES`` of the lowest bound at the largest number of samples."""
    return int(surprise.nats[:, -1].sum(dim=-1).argmin())
