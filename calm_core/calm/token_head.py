"""A head with a likelihood: the hidden state is the vector of the next patch, and a small decoder writes its tokens.

The other heads sample a latent, which a frozen autoencoder decodes into K tokens at once; none has a likelihood, and an
energy score of latents hardly tells a good sample from a bad one (docs/method.md). Here the next patch x has

    p(x | h, r) = prod_k softmax(W f(h, r, x_<k))[x_k],

r being the patch that was read last. So a CALM is trained by cross entropy, sampled exactly and scored exactly, and
needs no autoencoder. This head is not in the paper: what it shares with it is a backbone that reads and predicts one
vector for every K tokens. It has that of models with a global and a local part, such as MegaByte (Yu et al., 2023,
arXiv 2305.07185).

Notable:
- f is one sum and a few layers: what an earlier token adds depends on its position and on that of the token to come, a
  linear map for each pair, and no attention: among 2 K tokens all distances are known;
- it sees r, whose words the hidden state would have to carry otherwise: to predict "of" after "because", no context is
  needed;
- the decoder is not free: in the default run K steps of it take as much as one step of the backbone, and the projection
  on the vocabulary, which any softmax pays for each token, four times as much. Large models have a larger backbone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.nn.cross_entropy import projected_cross_entropy
from calm_core.nn.layers import ResidualSwiGLU, rms_norm
from calm_core.nn.limits import Layers, Width


@dataclass(frozen=True)
class TokenHeadConfig:
    """Shape of the decoder."""

    hidden_size: Width = 256
    intermediate_size: Width = 688
    layers: Layers = 1
    kind: Literal["tokens"] = "tokens"


class TokenHead(nn.Module):
    """Hidden states [..., hidden] and the patch that was read last -> the distribution of the next patch's K tokens."""

    def __init__(self, config: TokenHeadConfig, vocabulary_size: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.config, self.patch_size = config, patch_size
        size = config.hidden_size
        self.from_hidden_state = nn.Linear(hidden_size, patch_size * size)
        self.embedding = nn.Embedding(vocabulary_size, size)
        # That of position k reads the K + k tokens before it.
        self.from_earlier = nn.ParameterList(torch.empty(size, (patch_size + k) * size) for k in range(patch_size))
        self.layers = nn.Sequential(*(ResidualSwiGLU(size, config.intermediate_size) for _ in range(config.layers)))
        self.norm = rms_norm(size)
        self.unembedding = nn.Linear(size, vocabulary_size, bias=False)

    def zero_output(self) -> None:
        """Prepare fresh weights: what each layer adds starts at zero."""
        for layer in self.layers:
            assert isinstance(layer, ResidualSwiGLU)
            nn.init.zeros_(layer.mlp.down.weight)

    def loss(self, hidden_states: Tensor, read: Tensor, patches: Tensor) -> Tensor:
        """Mean of -log p(x | h, r) / K, nats a token, of ``patches`` [..., K] int64 after ``read`` [..., K].

        ``hidden_states`` [..., hidden] are those after ``read``. The cross entropy of the K tokens, each given those
        before it: a proper score, strictly so, of the whole patch.
        """
        states = self._states(hidden_states, read, patches).flatten(0, -2)
        return projected_cross_entropy(states, self.unembedding.weight, patches.flatten())

    def log_probabilities(self, hidden_states: Tensor, read: Tensor, patches: Tensor) -> Tensor:
        """log p(x_k | h, r, x_<k) of each token of ``patches``, [..., K] float32; arguments as in ``loss``."""
        logits = self.unembedding(self._states(hidden_states, read, patches)).float()
        return logits.gather(-1, patches[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)

    def logits(self, hidden_states: Tensor, earlier: Tensor) -> Tensor:
        """Logits [..., vocabulary] of what follows ``earlier`` [..., K + k]: r, and k < K tokens of its own patch."""
        position, size = earlier.shape[-1] - self.patch_size, self.config.hidden_size
        rows = slice(position * size, (position + 1) * size)
        projection = self.from_hidden_state
        state = F.linear(hidden_states, projection.weight[rows], projection.bias[rows]).float()
        state = state + self._of_earlier(position, self.embedding(earlier))
        return self.unembedding(self.norm(self.layers(state)))

    def _states(self, hidden_states: Tensor, read: Tensor, patches: Tensor) -> Tensor:
        """What the output matrix turns into logits, [..., K, size], each of the tokens before its own."""
        states = self.from_hidden_state(hidden_states).float().unflatten(-1, (self.patch_size, -1))
        embedded = self.embedding(torch.cat([read, patches[..., :-1]], dim=-1))
        added = [self._of_earlier(k, embedded[..., : self.patch_size + k, :]) for k in range(self.patch_size)]
        return self.norm(self.layers(states + torch.stack(added, dim=-2)))

    def _of_earlier(self, position: int, embedded: Tensor) -> Tensor:
        # The residual stream of the decoder is in float32, also under autocast.
        return F.linear(embedded.flatten(-2), self.from_earlier[position]).float()
