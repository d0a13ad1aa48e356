"""The continuous language model: a backbone over patches and a head that samples the next latent (paper, section 3).

Notable:
- the input of a position is the K tokens of a patch, squeezed; the latent itself, an ablation, is brittle to feed back;
- no softmax: the head samples a latent, and the frozen autoencoder decodes it into K tokens;
- any head will do that keeps to ``head.Head``: energy, diffusion or flow matching. They are told apart from
  ``token_head.TokenHead``, which has a likelihood and no latents, and needs no autoencoder.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.head import Head
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.nn.backbone import Backbone, BackboneConfig, KeyValueCache
from calm_core.nn.layers import LayerNorm, initialise
from calm_core.nn.limits import PatchSize, VocabularySize, Width

LatentHeadConfig = EnergyHeadConfig | DiffusionHeadConfig | FlowHeadConfig
AnyHeadConfig = LatentHeadConfig | TokenHeadConfig


@dataclass(frozen=True)
class CalmConfig:
    """Shape of a CALM; the defaults are the published CALM-M (371 M parameters beside its autoencoder)."""

    vocabulary_size: VocabularySize = 128_256
    patch_size: PatchSize = 4
    latent_size: Width = 128
    """Of the vector that stands for a patch; with a token head that is the hidden state."""
    backbone: BackboneConfig = BackboneConfig(1024, 2752, 16, 16, 16)
    head: AnyHeadConfig = EnergyHeadConfig()
    input: Literal["tokens", "latents"] = "tokens"


class PatchEmbedding(nn.Module):
    """Token ids of patches [..., K] -> one input vector a patch [..., hidden]."""

    def __init__(self, vocabulary_size: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        # Concatenated, not averaged: the order of a patch's tokens has to survive (section 3, "input step").
        self.projection = _input_projection(patch_size * hidden_size, hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        # The residual stream of the backbone starts in float32, also under autocast.
        return self.projection(self.embedding(token_ids).flatten(-2)).float()


class LatentEmbedding(nn.Module):
    """Latents of patches [..., latent] -> one input vector a patch [..., hidden]: the ablation."""

    def __init__(self, latent_size: int, hidden_size: int) -> None:
        super().__init__()
        self.projection = _input_projection(latent_size, hidden_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.projection(latents).float()


class Calm(nn.Module):
    """Patches in, hidden states out, from which ``head`` samples each next latent, or each next patch."""

    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.backbone.hidden_size
        self.patch_embedding: nn.Module
        if config.input == "tokens":
            self.patch_embedding = PatchEmbedding(config.vocabulary_size, config.patch_size, hidden_size)
        else:
            self.patch_embedding = LatentEmbedding(config.latent_size, hidden_size)
        self.backbone = Backbone(config.backbone)
        self.head: Head | TokenHead
        if isinstance(config.head, TokenHeadConfig):
            self.head = TokenHead(config.head, config.vocabulary_size, config.patch_size, hidden_size)
        else:
            self.head = config.head.build(hidden_size, config.latent_size)

    @property
    def latent_head(self) -> Head:
        """The head of a model that has latents."""
        assert not isinstance(self.head, TokenHead)
        return self.head

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights from ``generator``; the head's last linear and what layers add start at zero."""
        # Unit scale, which the projection's linears, drawn with variance 1 / fan-in, preserve.
        initialise(self, generator, embedding_std=1.0)
        self.backbone.zero_residuals()
        self.head.zero_output()

    def inputs(self, patches: Tensor, autoencoder: Autoencoder | None, latents: Tensor | None = None) -> Tensor:
        """What ``forward`` takes for ``patches`` [..., K] of token ids: themselves or, if so configured, latents.

        ``latents`` [..., latent] are those that the patches were decoded from; where they are not known, as for
        a prompt, the means of the encoder's posterior stand in.
        """
        if self.config.input == "tokens":
            return patches
        assert autoencoder is not None
        return autoencoder.encode(patches).mean if latents is None else latents

    def forward(
        self,
        inputs: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, patches, hidden] of ``inputs``: token ids [batch, patches, K] or latents [.., latent].

        The other arguments are those of ``Backbone.forward``.
        """
        return self.backbone(self.patch_embedding(inputs), cache, positions, mask)


def _input_projection(input_size: int, hidden_size: int) -> nn.Sequential:
    # LayerNorm, although the backbone has RMSNorm: the published input step.
    return nn.Sequential(
        nn.Linear(input_size, 2 * hidden_size),
        nn.SiLU(),
        nn.Linear(2 * hidden_size, hidden_size),
        LayerNorm(hidden_size),
    )
