"""A token head that writes patches: the function of ``TokenHead.logits`` for one position after the other, in fewer
operators.

As in ``backbone_step``, a step of a small model is the calling of its operators. What the K positions of a patch share
is done once: the projection of the hidden state, and the embeddings of the tokens before, which stay in one buffer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.continuations import sample_tokens
from calm_core.nn.layers import ResidualSwiGLU


@torch.no_grad()
def write_patch(
    head: TokenHead, hidden_states: Tensor, read: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """A patch a row of ``hidden_states`` [batch, hidden], [batch, K] int64, token by token from P^(1 / temperature).

    ``read`` [batch, K] are the token ids of the patch that was read last.
    """
    patch_size, size = head.patch_size, head.config.hidden_size
    states = head.from_hidden_state(hidden_states).unflatten(-1, (patch_size, size)).unbind(dim=1)
    embedded = states[0].new_empty(len(read), 2 * patch_size, size)
    embedded[:, :patch_size] = head.embedding(read)
    flat = embedded.flatten(1)
    drawn: list[Tensor] = []
    for k, state in enumerate(states):
        if k:
            embedded[:, patch_size + k - 1] = head.embedding(drawn[-1])
        state = torch.addmm(state, flat[:, : (patch_size + k) * size], head.from_earlier[k].T)
        for layer in head.layers:
            assert isinstance(layer, ResidualSwiGLU)
            normed, mlp = layer.norm(state), layer.mlp
            gated = F.silu(torch.mm(normed, mlp.gate.weight.T)).mul_(torch.mm(normed, mlp.up.weight.T))
            state = torch.addmm(state, gated, mlp.down.weight.T)
        logits = torch.mm(head.norm(state), head.unembedding.weight.T)
        if temperature != 1:
            logits /= temperature
        drawn.append(sample_tokens(logits.softmax(dim=-1), generator))
    return torch.stack(drawn, dim=1)
