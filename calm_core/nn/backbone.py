"""The causal decoder that CALM and the Transformer share (paper, section 3).

Notable:
- Llama's layer: RMSNorm, rotary embeddings in the half-split layout, SwiGLU, no biases;
- grouped-query attention: fewer key/value heads than query heads;
- one forward pass serves training (causal, no cache), generation (a cache that grows) and the sampling of
  continuations (a cache and an explicit mask).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.nn.layers import NORM_EPSILON, SwiGLU, rms_norm
from calm_core.nn.limits import Layers, PositiveFloat, Width, require_heads


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a backbone; the defaults are those of the published Transformer-S."""

    hidden_size: Width = 768
    intermediate_size: Width = 2048
    layers: Layers = 12
    heads: Width = 16
    key_value_heads: Width = 16
    rope_theta: PositiveFloat = 10_000.0
    norm_epsilon: PositiveFloat = NORM_EPSILON
    """No knob of a run: other values come with imported models."""

    def __post_init__(self) -> None:
        """Raise ValueError unless heads share the features, and key/value heads serve the heads, evenly."""
        require_heads(self.hidden_size, self.heads, self.key_value_heads)


class KeyValueCache:
    """Keys and values of the positions seen so far, [batch, key_value_heads, positions, head_size] each.

    Notable: a full buffer doubles, so that a step writes its own positions and copies no others.
    """

    def __init__(self, layers: int) -> None:
        # For each layer a buffer [2, batch, key_value_heads, capacity, head_size], and how many positions it holds.
        self._buffers: list[Tensor | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """How many positions are held."""
        return self._lengths[0]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions of ``layer``; returns all of its keys and values."""
        held, buffer = self._lengths[layer], self._buffers[layer]
        length = held + keys.shape[2]
        if buffer is None or length > buffer.shape[3]:
            # The first call is mostly a prompt, and often the only one: its buffer is as large as it needs.
            room = length if buffer is None else 2 * length
            grown = keys.new_empty(2, *keys.shape[:2], room, keys.shape[3])
            if buffer is not None:
                grown[:, :, :, :held] = buffer[:, :, :, :held]
            self._buffers[layer] = buffer = grown
        buffer[0, :, :, held:length], buffer[1, :, :, held:length] = keys, values
        self._lengths[layer] = length
        # Views: attention reads the buffer itself.
        return buffer[0, :, :, :length], buffer[1, :, :, :length]

    def repeat(self, times: int) -> "KeyValueCache":
        """A cache whose batch is ``times`` copies of this one's, copy by copy."""
        copy = KeyValueCache(len(self._buffers))
        # Copies, not expanded views: each sample appends tokens of its own.
        copy._buffers = [None if buffer is None else buffer.repeat(1, times, 1, 1, 1) for buffer in self._buffers]
        copy._lengths = list(self._lengths)
        return copy


def rotary_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [positions, head_size] float32, of positions [positions].

    Feature i and feature i + head_size / 2 turn together by position * theta^(-2 i / head_size).
    """
    # Float32 also under autocast: bf16 represents no odd position above 256.
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions.float()[:, None] * theta**-exponents
    # Half-split layout: feature i turns with feature i + head_size / 2, as in the reference, whose weights are imported
    # without reordering.
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(features: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn queries or keys [batch, heads, positions, head_size] by their positions' angles."""
    first, second = features.chunk(2, dim=-1)
    return features * cosines + torch.cat([-second, first], dim=-1) * sines


class Attention(nn.Module):
    """Causal grouped-query attention, [batch, positions, hidden] -> the same."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads, self.key_value_heads = config.heads, config.key_value_heads
        self.head_size = config.hidden_size // config.heads
        key_value_size = self.key_value_heads * self.head_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.value = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: int,
        cache: KeyValueCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        def split(features: Tensor) -> Tensor:
            return features.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        queries = rotate(split(self.query(hidden_states)), *angles)
        values = split(self.value(hidden_states))
        # Angles are float32, so rotated keys are too; attention wants one dtype, under autocast that of the values.
        keys = rotate(split(self.key(hidden_states)), *angles).to(values.dtype)
        if cache is not None:
            # Rotated, since an angle depends on the position alone, once for all query heads that share them.
            keys, values = cache.append(layer, keys, values)
        # is_causal aligns its mask at the first key, which is wrong as soon as keys are cached: those calls pass a mask
        # or have a single query, which sees every key.
        attended = F.scaled_dot_product_attention(
            queries.to(values.dtype),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and queries.shape[2] > 1,
            enable_gqa=self.heads != self.key_value_heads,
        )
        return self.output(attended.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention_norm = rms_norm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp_norm = rms_norm(config.hidden_size, config.norm_epsilon)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        layer: int,
        cache: KeyValueCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, angles, layer, cache, mask)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class Backbone(nn.Module):
    """Embeddings in, hidden states out, both [batch, positions, hidden]."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = rms_norm(config.hidden_size, config.norm_epsilon)

    def zero_residuals(self) -> None:
        """Set what each layer adds to its input to zero, so that training starts from the embeddings alone."""
        for layer in self.modules():
            if isinstance(layer, Layer):
                # Both outputs of a layer: at the start each layer is the identity.
                nn.init.zeros_(layer.attention.output.weight)
                nn.init.zeros_(layer.mlp.down.weight)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for this backbone."""
        return KeyValueCache(self.config.layers)

    def forward(
        self,
        embeddings: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Without ``cache`` the pass is causal over ``embeddings``. With one, the new positions are added to it
        and see all that it holds and, causally, one another. ``positions`` [positions] overrides
        their numbering (by default it continues the cache's), ``mask`` [positions, all keys], true where a
        position may look, overrides what they see.
        """
        held = cache.length if cache is not None else 0
        new = embeddings.shape[1]
        if positions is None:
            positions = torch.arange(held, held + new, device=embeddings.device)
        if mask is None and held and new > 1:  # one new position sees all there is, and needs no mask
            mask = torch.ones(new, held + new, dtype=torch.bool, device=embeddings.device).tril(held)
        head_size = self.config.hidden_size // self.config.heads
        angles = rotary_angles(positions, head_size, self.config.rope_theta)
        hidden_states = embeddings
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, angles, index, cache, mask)
        return self.norm(hidden_states)
