"""The baseline: a Transformer that predicts the next token by a softmax, on CALM's own backbone code."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calm_core.nn.backbone import Backbone, BackboneConfig, KeyValueCache
from calm_core.nn.cross_entropy import projected_cross_entropy
from calm_core.nn.layers import initialise
from calm_core.nn.limits import VocabularySize


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer; the defaults are the published Transformer-S (281 M parameters)."""

    vocabulary_size: VocabularySize = 128_256
    backbone: BackboneConfig = BackboneConfig()


class Transformer(nn.Module):
    """Token ids [batch, tokens] -> logits of each next token [batch, tokens, vocabulary]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.backbone.hidden_size)
        self.backbone = Backbone(config.backbone)
        # Not tied to the embedding: the published Transformer-S has 281 M parameters with two matrices (section 6).
        self.output = nn.Linear(config.backbone.hidden_size, config.vocabulary_size, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights from ``generator``."""
        # The residual stream starts at unit scale; the output matrix is not tied, so it may.
        initialise(self, generator, embedding_std=1.0)
        self.backbone.zero_residuals()

    def forward(
        self,
        token_ids: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits; the other arguments are those of ``Backbone.forward``."""
        return self.output(self.hidden_states(token_ids, cache, positions, mask))

    def hidden_states(
        self,
        token_ids: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the output matrix turns into logits, [batch, tokens, hidden]."""
        return self.backbone(self.embedding(token_ids), cache, positions, mask)


def next_token_loss(model: Transformer, token_ids: Tensor) -> Tensor:
    """Mean cross entropy in nats of every token but the first, of token ids [batch, tokens]."""
    # Hidden states, not logits: the loss projects them block by block.
    hidden_states = model.hidden_states(token_ids[:, :-1]).flatten(0, 1)
    return projected_cross_entropy(hidden_states, model.output.weight, token_ids[:, 1:].flatten())
