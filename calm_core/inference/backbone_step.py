"""A backbone's pass over one new position a row: the function of ``nn.backbone``, in a third of the operators.

A step of a small model is not its products, whose weights fit the processor's cache, but what it takes to call some
hundred operators; so it is on a GPU, where each is a launch. ``Backbone.forward`` is written for any number of
positions and for training. Here the shapes are those of a single position, known once and for all:

- rows are a matrix [batch, hidden], and no product reshapes them; residual sums are part of the products;
- queries, keys and values are written into one buffer, where queries and keys are turned together;
- the angles of positions to come, and who sees what, are tables of which a step takes a row.

It takes the backbone's own weights, so nothing is copied or kept twice, and appends to the same cache. Sums are in
another order than there: results agree but for rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.nn.backbone import Backbone, KeyValueCache, Layer, rotary_angles
from calm_core.nn.layers import RMSNorm

POSITIONS_AHEAD = 64
"""Positions that a table has at least; from there on it doubles, as the cache does."""


class BackboneStep:
    """``step(embeddings)``: hidden states [batch, hidden] after the final norm of one new position a row.

    ``cache`` holds what stands before and grows; ``padding`` [batch] int64 is how many positions at its start each row
    does not see, None for none. For inference alone: there are no gradients, and all are on one device.
    """

    def __init__(self, backbone: Backbone, cache: KeyValueCache, padding: Tensor | None = None) -> None:
        self._config, self._cache, self._padding = backbone.config, cache, padding
        self._layers = [_weights(layer) for layer in backbone.layers]
        self._norm = backbone.norm
        self._head_size = self._config.hidden_size // self._config.heads
        self._first = self._last = 0
        self._packed: Tensor | None = None

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """``embeddings`` [batch, hidden] are those of the new position of each row."""
        heads, key_value_heads = self._config.heads, self._config.key_value_heads
        if self._packed is None:
            self._make_room(embeddings)
        assert self._packed is not None
        position = self._cache.length
        if not self._first <= position < self._last:
            self._look_ahead(position, embeddings.device)
        cosines, sines = self._cosines[position - self._first], self._sines[position - self._first]
        mask = None if self._visible is None else self._visible[..., : position + 1]
        hidden_states = embeddings
        for index, layer in enumerate(self._layers):
            normed = _normed(hidden_states, layer.attention_norm)
            for weight, out in zip(layer.queries_keys_values, self._parts, strict=True):
                torch.mm(normed, weight, out=out)
            # Half-split layout: the other half of a feature's pair is half a head away.
            turned = torch.addcmul(self._turning * cosines, self._turning.roll(self._head_size // 2, dims=-1), sines)
            queries, keys = turned.unsqueeze(2).split([heads, key_value_heads], dim=1)
            keys, values = self._cache.append(index, keys, self._packed[:, heads + key_value_heads :].unsqueeze(2))
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, enable_gqa=heads != key_value_heads
            )
            hidden_states = torch.addmm(hidden_states, attended.flatten(1), layer.output)
            normed = _normed(hidden_states, layer.mlp_norm)
            gated = F.silu(torch.mm(normed, layer.gate)).mul_(torch.mm(normed, layer.up))
            hidden_states = torch.addmm(hidden_states, gated, layer.down)
        return _normed(hidden_states, self._norm)

    def _make_room(self, embeddings: Tensor) -> None:
        """The buffer of queries, keys and values, [batch, heads + 2 key_value_heads, head_size], and its parts."""
        heads, key_value_heads, size = self._config.heads, self._config.key_value_heads, self._head_size
        self._packed = embeddings.new_empty(len(embeddings), heads + 2 * key_value_heads, size)
        self._turning = self._packed[:, : heads + key_value_heads]
        widths = [heads * size, key_value_heads * size, key_value_heads * size]
        self._parts = self._packed.flatten(1).split(widths, dim=1)

    def _look_ahead(self, position: int, device: torch.device) -> None:
        """Angles, a row a position, from ``position`` on, and which keys up to the last of them each row sees."""
        self._first, self._last = position, position + max(POSITIONS_AHEAD, position)
        positions = torch.arange(self._first, self._last, device=device)
        cosines, sines = rotary_angles(positions, self._head_size, self._config.rope_theta)
        half = self._head_size // 2
        # The first half turns by minus the second one.
        sines[:, :half].neg_()
        self._cosines, self._sines = cosines.unbind(), sines.unbind()
        self._visible: Tensor | None = None
        if self._padding is not None:
            keys = torch.arange(self._last, device=device)
            self._visible = keys >= self._padding[:, None, None, None]


class _Weights:
    """A layer's matrices as a product from the left takes them, [in, out], and its norms."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
        self.queries_keys_values = [part.weight.T for part in (attention.query, attention.key, attention.value)]
        self.output, self.gate, self.up, self.down = (
            part.weight.T for part in (attention.output, mlp.gate, mlp.up, mlp.down)
        )


def _weights(layer: torch.nn.Module) -> _Weights:
    assert isinstance(layer, Layer)
    return _Weights(layer)


def _normed(hidden_states: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(hidden_states, norm.normalized_shape, norm.weight, norm.eps)
