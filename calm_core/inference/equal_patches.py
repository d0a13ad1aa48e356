"""Which of many latents decode to the same patch, without decoding most of them.

The batch sampler (``temperature``) counts equal patches. Two patches are equal if their tokens are, position by
position, so a latent whose token at one position is no other latent's is like no other, whatever its other tokens are.
Positions are therefore decoded one after the other, each only for latents that still have a partner: what is found is
the same partition that decoding all of them gives. The last position comes first: farthest from what was read, it has
the flattest distribution, and leaves the fewest partners.

With q_k the share of latents that still have a partner before position k, the decoder's token layers and the vocabulary
matrix, which are most of a sample's cost, run sum_k q_k times a latent instead of K times; docs/method.md has figures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.cross_entropy import BLOCK_LOGITS, LEAST_ROWS


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
        token_ids[first : first + at_once] = F.linear(hidden_states, vocabulary).argmax(dim=-1)
    return token_ids
