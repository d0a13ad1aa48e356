"""The layers that every network here is made of: norms and SwiGLU, in residual form.

Norms are torch's own, with the published epsilon; SwiGLU is down(silu(gate(x)) * up(x)) without biases
(paper, sections 2 and 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6


class RMSNorm(nn.RMSNorm):
    """torch's, in float32 for a float32 input whatever its gain is in: a sharded training gathers weights in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _as_precise(self.weight, x), self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's with the published epsilon; gain and bias as in ``RMSNorm``."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = _as_precise(self.weight, x), _as_precise(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, gain, bias, self.eps)


def _as_precise(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, x.dtype))


def rms_norm(size: int, epsilon: float = NORM_EPSILON) -> RMSNorm:
    """An RMSNorm over the last dimension of ``size`` features; ``epsilon`` is added to their mean square."""
    return RMSNorm(size, eps=epsilon)


class SwiGLU(nn.Module):
    """Gated feed-forward network, [..., hidden] -> [..., hidden], three bias-free projections."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))


class ResidualSwiGLU(nn.Module):
    """x + SwiGLU(RMSNorm(x)), [..., hidden] -> [..., hidden]: a layer of the autoencoder."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.norm = rms_norm(hidden_size)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


def is_embedding(name: str) -> bool:
    """Whether the parameter ``name`` is a table whose rows are looked up; an unembedding is a matrix as any other."""
    return name == "embedding.weight" or name.endswith(".embedding.weight")


def initialise(module: nn.Module, generator: torch.Generator, embedding_std: float) -> None:
    """Draw fresh weights: linear layers from Normal(0, 1 / fan-in), embeddings from Normal(0, embedding_std^2).

    Biases start at 0 and gains at 1. The variance keeps signals at unit scale at every width; the fixed 0.02
    of large models all but silences an MLP of width 128. Weights are drawn in the order of ``named_parameters``, so
    they are a function of the generator alone.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # First, since an embedding is a matrix too, whose rows are looked up and not summed over: fan-in says
            # nothing of it.
            if is_embedding(name):
                parameter.normal_(0.0, embedding_std, generator=generator)
            elif parameter.ndim >= 2:
                # torch stores a linear as [out, in].
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
