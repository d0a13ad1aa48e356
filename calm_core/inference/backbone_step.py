"""A backbone's pass over one new position a row: the function of ``nn.backbone``, in three fifths of the time.

A step of a small model is not its products, whose weights fit the processor's cache, but what it takes to call some
hundred operators, and the modules that they are in. ``Backbone.forward`` is written for any number of positions and
for training. Here the shapes are those of a single position, known once and for all:

- rows are a matrix [batch, hidden], which no product has to reshape;
- queries and keys lie in one tensor, and are turned together;
- the angles of positions to come, and who sees what, are tables of which a step takes a row.

It takes the backbone's own weights, so nothing is copied or kept twice, and appends to the same cache. Results agree
with those there but for rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        self._layers = [_Weights(layer) for layer in backbone.layers]
        self._norm = backbone.norm
        self._head_size = self._config.hidden_size // self._config.heads
        self._first = self._last = 0

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """``embeddings`` [batch, hidden] are those of the new position of each row."""
        heads, key_value_heads = self._config.heads, self._config.key_value_heads
        position = self._cache.length
        if not self._first <= position < self._last:
            self._look_ahead(position, embeddings.device)
        cosines, sines = self._cosines[position - self._first], self._sines[position - self._first]
        mask = None if self._visible is None else self._visible[..., : position + 1]
        hidden_states = embeddings
        for index, layer in enumerate(self._layers):
            normed = _normed(hidden_states, layer.attention_norm)
            projected = torch.cat([F.linear(normed, weight) for weight in layer.queries_keys_values], dim=1)
            turning, values = projected.view(len(projected), -1, 1, self._head_size).split(
                [heads + key_value_heads, key_value_heads], dim=1
            )
            # Half-split layout: the other half of a feature's pair is half a head away.
            turned = torch.addcmul(turning * cosines, turning.roll(self._head_size // 2, dims=-1), sines)
            queries, keys = turned.split([heads, key_value_heads], dim=1)
            keys, values = self._cache.append(index, keys, values)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, enable_gqa=heads != key_value_heads
            )
            hidden_states = hidden_states + F.linear(attended.flatten(1), layer.output)
            normed = _normed(hidden_states, layer.mlp_norm)
            gated = F.silu(F.linear(normed, layer.gate)).mul_(F.linear(normed, layer.up))
            hidden_states = hidden_states + F.linear(gated, layer.down)
        return _normed(hidden_states, self._norm)

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
    """A layer's own weights, at hand: to ask a module for them takes as long as a small product."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        attention, mlp = layer.attention, layer.mlp
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
        self.queries_keys_values = [part.weight for part in (attention.query, attention.key, attention.value)]
        self.output, self.gate, self.up, self.down = (
            part.weight for part in (attention.output, mlp.gate, mlp.up, mlp.down)
        )


def _normed(hidden_states: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(hidden_states, norm.normalized_shape, norm.weight, norm.eps)
