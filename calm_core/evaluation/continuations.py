"""Independent continuations of every position of a block at once.

BrierLM needs, at each position, samples of the tokens that follow. One position at a time that takes as many forward
passes as there are positions. Here one pass reads the block into the key/value cache, and all positions continue in
parallel, each as a branch: at every further step a branch attends to the block up to its own position and to its own
earlier steps, not to the other branches. An attention mask (``branch_mask``) says so.

Where a model knows probabilities, as the Transformer and a CALM with a token head do, they serve wherever they can
(``brier.brier_from_probabilities``): only the prefixes of the collision term are sampled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.brier import brier_from_probabilities
from calm_core.runtime.float64 import float64_device
from calm_core.runtime.row_generators import Generators, uniform
from calm_core.tokens.blocks import MAX_TOKENS
from calm_core.transformer.model import Transformer

MANY_PROBABILITIES = 1 << 17
"""From so many on, tokens are drawn in two steps; both ways give the same tokens, to the last digits of float64."""

RUN = 64
"""Tokens whose probabilities are summed up first."""


def branch_mask(leaves: Tensor, prefix: int, steps: int) -> Tensor:
    """What the branches may look at in their step number ``steps``, [branches, prefix + steps * branches] bool.

    ``leaves`` [branches] is the last position of the prefix that each branch sees. The keys of the
    prefix come first, then those of every step so far, the present one included, branch by branch.
    """
    sees_prefix = torch.arange(prefix, device=leaves.device) <= leaves[:, None]
    own = torch.eye(len(leaves), dtype=torch.bool, device=leaves.device)
    return torch.cat([sees_prefix, own.repeat(1, steps)], dim=1)


def calm_continuations(
    model: Calm, autoencoder: Autoencoder, patches: Tensor, tokens: int, samples: int, generator: torch.Generator
) -> Tensor:
    """Independent samples of the next ``tokens`` token ids after every patch, [samples, batch, patches, tokens].

    ``patches`` is [batch, patches, K]. Where K < ``tokens``, each sample continues from its own decoded patches.
    """
    batch, count, patch_size = patches.shape
    cache = model.backbone.new_cache()
    # Samples of one position share its hidden state; the first patch needs one pass however many are drawn.
    hidden_states = model(model.inputs(patches, autoencoder), cache).repeat(samples, 1, 1)
    leaves = torch.arange(count, device=patches.device)
    steps = -(-tokens // patch_size)
    # From the second patch on each sample has keys and values of its own.
    if steps > 1:
        cache = cache.repeat(samples)
    drawn: list[Tensor] = []
    latents: Tensor | None = None
    for step in range(steps):
        if step:
            # Positions follow each branch's leaf, not the cache's length: rotary embeddings see them as neighbours.
            mask = branch_mask(leaves, count, step)
            hidden_states = model(model.inputs(drawn[-1], autoencoder, latents), cache, leaves + step, mask)
        draws = model.latent_head.sampling_draws((samples * batch, count), generator)
        latents = model.latent_head.sample(hidden_states, draws)
        drawn.append(autoencoder.decode(latents))
    return torch.cat(drawn, dim=-1)[..., :tokens].unflatten(0, (samples, batch))


def transformer_brier(
    model: Transformer, token_ids: Tensor, leaves: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Unbiased Brier-1 to Brier-4 of what follows the positions ``leaves`` [branches], [batch, branches, 4].

    ``token_ids`` [batch, tokens] must go on for four tokens after the last of ``leaves``.
    """
    batch, length = token_ids.shape[0], token_ids.shape[1] - 1
    cache = model.backbone.new_cache()
    probabilities = model(token_ids[:, :-1], cache).float().softmax(dim=-1)
    # The targets' probabilities are exact, so the accuracy term has no sampling error.
    of_targets = probabilities.gather(-1, token_ids[:, 1:, None]).squeeze(-1).log()
    windows = of_targets.unfold(1, MAX_TOKENS, 1)[:, leaves]

    probabilities = probabilities[:, leaves]
    # Samples of the first token share its probabilities; from there on each goes its own way.
    collisions = [probabilities.square().sum(dim=-1).repeat(samples, 1)]
    probabilities = probabilities.repeat(samples, 1, 1)
    cache = cache.repeat(samples)
    prefix = torch.zeros(samples * batch, len(leaves), device=token_ids.device)
    prefixes = [prefix]
    for step in range(1, MAX_TOKENS):
        drawn = sample_tokens(probabilities, generator)
        prefix = prefix + probabilities.gather(-1, drawn[..., None]).squeeze(-1).log()
        mask = branch_mask(leaves, length, step)
        probabilities = model(drawn, cache, leaves + step, mask).float().softmax(dim=-1)
        prefixes.append(prefix)
        collisions.append(probabilities.square().sum(dim=-1))

    return brier_from_probabilities(windows, _by_sample(prefixes, samples), _by_sample(collisions, samples))


def token_head_brier(model: Calm, patches: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """The same for a CALM with a token head, of what follows every patch but those at the end, [batch, branches, 4].

    ``patches`` [batch, branches + ceil(4 / K), K] go on for four tokens after the last branch.
    """
    head, patch_size = model.head, model.config.patch_size
    assert isinstance(head, TokenHead)
    following = -(-MAX_TOKENS // patch_size)
    batch, count = patches.shape[0], patches.shape[1] - following
    cache = model.backbone.new_cache()
    hidden_states = model(patches[:, :-1], cache)
    of_targets = head.log_probabilities(hidden_states, patches[:, :-1], patches[:, 1:]).flatten(1)
    windows = of_targets.unfold(1, MAX_TOKENS, patch_size)[:, :count]

    leaves = torch.arange(count, device=patches.device)
    states = hidden_states[:, :count].repeat(samples, 1, 1)
    if following > 1:
        cache = cache.repeat(samples)
    prefix = torch.zeros(samples * batch, count, device=patches.device)
    prefixes, collisions = [], []
    # What the head sees: the patch that was read, and the tokens of the next one so far.
    earlier = patches[:, :count].repeat(samples, 1, 1)
    for index in range(MAX_TOKENS):
        if index and index % patch_size == 0:
            # A patch is whole: the backbone reads it, each branch its own, behind the block.
            step = index // patch_size
            earlier = earlier[..., patch_size:]
            mask = branch_mask(leaves, patches.shape[1] - 1, step)
            states = model(earlier, cache, leaves + step, mask)
        probabilities = head.logits(states, earlier).float().softmax(dim=-1)
        prefixes.append(prefix)
        collisions.append(probabilities.square().sum(dim=-1))
        if len(prefixes) == MAX_TOKENS:
            break  # no prefix goes on behind the last token, and drawing one takes longer than the head
        drawn = sample_tokens(probabilities, generator)[..., None]
        prefix = prefix + probabilities.gather(-1, drawn).squeeze(-1).log()
        earlier = torch.cat([earlier, drawn], dim=-1)

    return brier_from_probabilities(windows, _by_sample(prefixes, samples), _by_sample(collisions, samples))


def _by_sample(steps: list[Tensor], samples: int) -> Tensor:
    """``steps``, each [samples * batch, branches], as [samples, batch, branches, steps]."""
    return torch.stack(steps, dim=-1).unflatten(0, (samples, -1))


def sample_tokens(probabilities: Tensor, generator: Generators) -> Tensor:
    """One token id a position, [rows, ...], from probabilities [rows, ..., vocabulary], by their running sum's inverse.

    One random number a position instead of one a token of the vocabulary, which would take longer than the model.
    """
    exact = probabilities.to(float64_device(probabilities.device))
    if exact.numel() < MANY_PROBABILITIES:
        # In float64: float32 sums over a large vocabulary would round rare tokens away.
        sums = exact.cumsum(dim=-1, dtype=torch.float64)
        # Scaled by the last sum, which is not exactly 1.
        token_ids = _first_above(sums, uniform((*sums.shape[:-1], 1), generator) * sums[..., -1:])
    else:
        # The same place of the running sum, in two steps: which run of tokens it lies in, and which token there. Sums
        # in float64 are then made of some of the probabilities alone; all of them would not fit the cache.
        runs = F.pad(exact, (0, -exact.shape[-1] % RUN)).unflatten(-1, (-1, RUN))
        sums = runs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        places = uniform((*sums.shape[:-1], 1), generator) * sums[..., -1:]
        run = _first_above(sums, places)
        before = F.pad(sums, (1, 0)).gather(-1, run)
        inside = runs.gather(-2, run[..., None].expand(*run.shape, RUN)).squeeze(-2).cumsum(dim=-1, dtype=torch.float64)
        # Rounding may put the place behind the run's last token, which it then means.
        last = inside[..., -1:]
        place = torch.minimum(places - before, last.nextafter(torch.zeros_like(last)))
        token_ids = run * RUN + _first_above(inside, place)
    return token_ids.squeeze(-1).clamp(max=probabilities.shape[-1] - 1).to(probabilities.device)


def _first_above(sums: Tensor, places: Tensor) -> Tensor:
    """The first of ``sums`` [..., n] above each of ``places`` [..., 1]: never one that adds nothing to those before."""
    return torch.searchsorted(sums, places, right=True).clamp(max=sums.shape[-1] - 1)
