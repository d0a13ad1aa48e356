"""A token head that writes patches: the function of ``TokenHead.logits``, one position after the other, in three fifths
of the time.

As in ``backbone_step``, what a position of a small model takes is the calling of its operators, so there are few: what
the positions of a patch share is done once, sums are part of products, and weights are at hand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.calm.token_head import TokenHead
from calm_core.evaluation.continuations import sample_tokens
from calm_core.nn.layers import ResidualSwiGLU
from calm_core.runtime.row_generators import Generators


class PatchWriter:
    """``write(hidden_states, read, temperature, generator)``: a patch a row, by ``head``'s own weights.

    For inference alone: there are no gradients.
    """

    def __init__(self, head: TokenHead) -> None:
        self._patch_size, self._size = head.patch_size, head.config.hidden_size
        self._from_hidden_state = head.from_hidden_state.weight, head.from_hidden_state.bias
        self._embedding = head.embedding.weight
        self._from_earlier = [weight.T for weight in head.from_earlier]
        self._layers = [_Weights(layer) for layer in head.layers]
        self._norm, self._epsilon = head.norm.weight, head.norm.eps
        self._unembedding = head.unembedding.weight

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, read: Tensor, temperature: float, generator: Generators) -> Tensor:
        """Token ids [batch, K] after ``read`` [batch, K], each from P^(1 / temperature) given those before it.

        ``hidden_states`` [batch, hidden] are those after ``read``.
        """
        states = F.linear(hidden_states, *self._from_hidden_state).unflatten(1, (self._patch_size, self._size))
        earlier = F.embedding(read, self._embedding).flatten(1)
        written: list[Tensor] = []
        for position, state in enumerate(states.unbind(dim=1)):
            if position:
                earlier = torch.cat([earlier, F.embedding(written[-1], self._embedding)], dim=1)
            state = torch.addmm(state, earlier, self._from_earlier[position])
            for layer in self._layers:
                normed = self._normed(state, layer.norm)
                gated = F.silu(torch.mm(normed, layer.gate)).mul_(torch.mm(normed, layer.up))
                state = torch.addmm(state, gated, layer.down)
            # The largest product: by ``linear``, which ``few_rows`` knows.
            logits = F.linear(self._normed(state, self._norm), self._unembedding)
            if temperature != 1:
                logits = logits / temperature
            written.append(sample_tokens(logits.softmax(dim=-1), generator))
        return torch.stack(written, dim=1)

    def _normed(self, state: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(state, (self._size,), gain, self._epsilon)


class _Weights:
    """A layer's norm, and its matrices as a product from the left takes them, [in, out]."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, ResidualSwiGLU)
        self.norm = layer.norm.weight
        self.gate, self.up, self.down = (part.weight.T for part in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))
