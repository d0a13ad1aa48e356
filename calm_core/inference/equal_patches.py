"""Which of many latents decode to the same patch, without decoding most of them.

The batch sampler (``temperature``) counts equal patches. Two patches are equal if their tokens are, position by
position, so a latent whose token at one position is no other latent's is like no other, whatever its other tokens are.
Positions are therefore decoded one after the other, each only for latents that still have a partner: what is found is
the same partition that decoding all of them gives. The last position comes first: farthest from what was read, it has
the flattest distribution, and leaves the fewest partners.

With q_k the share of latents that still have a partner before position k, the decoder's token layers and the vocabulary
matrix, which are most of a sample's cost, run sum_k q_k times a latent instead of K times; docs/method.md has figures.

Texts have nothing to do with each other here, so that threads take some of them each, side by side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.head import Head
from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.cross_entropy import BLOCK_LOGITS, LEAST_ROWS
from calm_core.nn.largest import largest
from calm_core.runtime.threads import side_by_side

CANDIDATES_AT_ONCE = 1024
"""About how many samples go through the head and the decoder together on a CPU."""

CANDIDATE_VALUES = 1024
"""About what one of them takes in the head's widest layers, which bounds how many a GPU has together."""


class Candidates(NamedTuple):
    """Samples of each row, and which of them are the same patch."""

    latents: Tensor
    """[N, rows, latent]"""
    patches: Tensor
    """[N, rows] int64, as ``equal_patches`` has them"""


def candidates(head: Head, autoencoder: Autoencoder, hidden_states: Tensor, draws: Tensor) -> Candidates:
    """N samples a row of ``hidden_states`` [rows, hidden] for ``draws`` [..., N, rows, size], which the head asked for.

    On a CPU some rows at a time, the same ones whatever the number of threads.
    """
    count, rows = draws.shape[-3:-1]
    values = count * CANDIDATE_VALUES
    at_once = rows_at_once(values, draws.device, CANDIDATES_AT_ONCE * CANDIDATE_VALUES)
    parts = torch.arange(rows, device=draws.device).tensor_split(-(-rows // at_once))

    def made(part: Tensor) -> Candidates:
        latents = head.sample(hidden_states[part], draws.index_select(-2, part))
        return Candidates(latents, equal_patches(autoencoder, latents))

    if len(parts) == 1:  # nobody to share with: its operators have all threads
        return made(parts[0])
    assert isinstance(head, nn.Module)
    shared = side_by_side(made, parts, draws.device, head, autoencoder)
    latents, patches = zip(*shared, strict=True)
    return Candidates(torch.cat(latents, dim=1), torch.cat(patches, dim=1))


def equal_patches(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Numbers [N, rows] int64 that are equal in a row where ``latents`` [N, rows, latent] decode to the same patch."""
    count, rows, size = latents.shape
    decoder = autoencoder.decoder
    states = decoder.patch_layers(decoder.from_latent(latents.reshape(-1, size)).float())
    # Patches of different rows are never compared: to begin with, all of a row are equal.
    groups = torch.arange(rows, device=latents.device).repeat(count)
    open_latents = torch.arange(count * rows, device=latents.device)
    used = rows
    for position in reversed(range(autoencoder.config.patch_size)):
        tokens = tokens_at(autoencoder, states[open_latents], position)
        keys = groups[open_latents] * autoencoder.config.vocabulary_size + tokens
        found, inverse, members = torch.unique(keys, return_inverse=True, return_counts=True)
        groups[open_latents] = used + inverse
        used += len(found)
        open_latents = open_latents[members[inverse] > 1]
        if len(open_latents) == 0:
            break
    return groups.view(count, rows)


def tokens_at(autoencoder: Autoencoder, patch_states: Tensor, position: int) -> Tensor:
    """The most probable token at ``position`` of patches whose states before the expansion are given, [patches] int64.

    ``patch_states`` is [patches, hidden]. Some patches at a time, as in ``Autoencoder.decode``.
    """
    decoder, hidden_size = autoencoder.decoder, autoencoder.config.hidden_size
    # The expansion's rows are the states of the positions, one after the other.
    own = slice(position * hidden_size, (position + 1) * hidden_size)
    weight, bias = decoder.expand.weight[own], decoder.expand.bias[own]
    vocabulary = autoencoder.encoder.embedding.weight
    at_once = rows_at_once(len(vocabulary), patch_states.device, BLOCK_LOGITS, LEAST_ROWS)
    token_ids = torch.empty(len(patch_states), dtype=torch.int64, device=patch_states.device)
    for first in range(0, len(patch_states), at_once):
        expanded = F.linear(patch_states[first : first + at_once], weight, bias).float()
        hidden_states = decoder.norm(decoder.token_layers(expanded))
        token_ids[first : first + at_once] = largest(F.linear(hidden_states, vocabulary))
    return token_ids
