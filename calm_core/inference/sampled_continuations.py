"""Independent continuations of places in a text, at a temperature: what quality and diversity are measured on.

The steps are those by which ``calm generate`` writes. Unlike there a prompt is a piece of a split, which may begin in
the middle of a document, and a continuation goes on behind the end of one, as the split itself does: all have the same
length, the true ones included.

One generator draws for all prompts that go together, where ``LanguageModel.stream`` has one for each text: here the
prompts, their order and number are given with the seed, and figures were published of the texts that these draws give.
"""

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.inference.decoding import Prompts, Sampling, calm_steps, transformer_steps
from calm_core.runtime.device import device_of
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.runtime.threads import side_by_side
from calm_core.transformer.model import Transformer

PROMPTS_AT_ONCE = 16
"""Prompts that go on together. A constant, since the draws of a prompt depend on those beside it here."""


class Continuations(NamedTuple):
    """What a model wrote after each prompt."""

    token_ids: Tensor
    """[copies, prompts, tokens] int64, on the CPU"""
    exact: Tensor
    """[copies, prompts] float64, on the CPU: the share of steps that are from P^(1 / temperature) itself"""
    reached: Tensor
    """[copies, prompts] float64, on the CPU: the share of steps that are not from a higher one for want of draws"""


def sampled_continuations(
    model: Calm | Transformer,
    autoencoder: Autoencoder | None,
    prompts: Tensor,
    tokens: int,
    copies: int,
    sampling: Sampling,
    seed: int,
    *purpose: str | int,
) -> Continuations:
    """Continue each of ``prompts`` [prompts, whole patches of tokens] ``copies`` times, independently, by ``tokens``.

    ``seed`` and ``purpose`` key the draws, as in ``runtime.randomness.generator``. Whole patches are sampled; what they
    have beyond ``tokens`` is left out. A CALM that has latents comes with its ``autoencoder``.
    """
    device = device_of(model)

    def continued(numbered: tuple[int, Tensor]) -> Continuations:
        number, some = numbered
        draws = generator(seed, *purpose, number, device=device)
        # Copy after copy, so that rows part as [copies, prompts].
        rows = some.repeat(copies, 1).to(device)
        aligned = Prompts(rows, torch.zeros(len(rows), dtype=torch.int64, device=device))
        if isinstance(model, Transformer):
            steps, patch_size = transformer_steps(model, aligned, sampling, draws), 1
        else:
            steps, patch_size = calm_steps(model, autoencoder, aligned, sampling, draws), model.config.patch_size
        taken = list(islice(steps, -(-tokens // patch_size)))
        token_ids = torch.cat([step.token_ids for step in taken], dim=1)[:, :tokens]
        exact = torch.stack([step.finished & step.exact for step in taken]).cpu().double().mean(dim=0)
        reached = torch.stack([step.reached for step in taken]).cpu().double().mean(dim=0)
        return Continuations(*(part.cpu().unflatten(0, (copies, -1)) for part in (token_ids, exact, reached)))

    models = [part for part in (model, autoencoder) if part is not None]
    done = []
    with progress(f"continuations at temperature {sampling.temperature}", len(prompts), "prompts") as advance:
        for some in side_by_side(continued, enumerate(prompts.split(PROMPTS_AT_ONCE)), device, *models):
            done.append(some)
            advance(some.token_ids.shape[1])
    return Continuations(*(torch.cat(parts, dim=1) for parts in zip(*done, strict=True)))
