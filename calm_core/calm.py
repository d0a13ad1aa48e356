"""The continuous language model: a backbone over patches and a head that samples the next latent (paper, section 3).

Notable:
- the input of a position is the K tokens of a patch, squeezed; not the latent, which is brittle to feed back;
- no softmax: the head samples a latent, and the frozen autoencoder decodes it into K tokens;
- the energy score may be taken in several spaces at once, see ``energy_loss``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calm_core import params
from calm_core.autoencoder import AutoencoderConfig
from calm_core.backbone import Backbone, BackboneConfig, KeyValueCache
from calm_core.energy_head import EnergyHead, EnergyHeadConfig
from calm_core.energy_score import energy_score
from calm_core.layers import NORM_EPSILON, initialise


@dataclass(frozen=True)
class CalmConfig:
    """Shape of a CALM; the defaults are the published CALM-M (371 M parameters beside its autoencoder)."""

    vocabulary_size: int = 128_256
    patch_size: int = 4
    latent_size: int = 128
    backbone: BackboneConfig = BackboneConfig(1024, 2752, 16, 16, 16)
    head: EnergyHeadConfig = EnergyHeadConfig()

    @classmethod
    def from_params(cls, section: params.Calm, autoencoder: AutoencoderConfig) -> "CalmConfig":
        """The shape that params.yaml asks for, on the latents of ``autoencoder``."""
        return cls(
            autoencoder.vocabulary_size,
            autoencoder.patch_size,
            autoencoder.latent_size,
            BackboneConfig.from_params(section),
            EnergyHeadConfig(section.head_blocks, section.noise_size),
        )


class PatchEmbedding(nn.Module):
    """Token ids of patches [..., K] -> one input vector a patch [..., hidden]."""

    def __init__(self, vocabulary_size: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        self.projection = nn.Sequential(
            nn.Linear(patch_size * hidden_size, 2 * hidden_size),
            nn.SiLU(),
            nn.Linear(2 * hidden_size, hidden_size),
            nn.LayerNorm(hidden_size, eps=NORM_EPSILON),
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.projection(self.embedding(token_ids).flatten(-2)).float()


class Calm(nn.Module):
    """Patches of token ids in, hidden states out, from which ``head`` samples each next latent."""

    def __init__(self, config: CalmConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.backbone.hidden_size
        self.patch_embedding = PatchEmbedding(config.vocabulary_size, config.patch_size, hidden_size)
        self.backbone = Backbone(config.backbone)
        self.head = EnergyHead(config.head, hidden_size, config.latent_size)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights from ``generator``; the head's last linear and what layers add start at zero."""
        initialise(self, generator, embedding_std=1.0)
        self.backbone.zero_residuals()
        self.head.zero_output()

    def forward(
        self,
        token_ids: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, patches, hidden] of patches [batch, patches, K] of token ids.

        The other arguments are those of ``Backbone.forward``.
        """
        return self.backbone(self.patch_embedding(token_ids), cache, positions, mask)


class EnergyLoss(NamedTuple):
    """``total`` = ``fidelity - diversity``, averaged over positions and added over spaces; scalars."""

    total: Tensor
    fidelity: Tensor
    diversity: Tensor


Space = Callable[[Tensor], Tensor]
"""A differentiable map of latents [..., latent] to [..., parts, size]; each part is scored on its own."""


def energy_loss(
    samples: Tensor, targets: Tensor, alpha: float = 1.0, spaces: tuple[Space, ...] = (), scored_targets: int = 1
) -> EnergyLoss:
    """Energy score of latent ``samples`` [N, positions, latent] against ``targets`` [M, positions, latent].

    The published loss scores the latents as they are. Each of ``spaces`` adds the score of their images,
    averaged over parts and, to save work, over the first ``scored_targets`` targets alone; a sum of proper
    scores is proper, and strictly so while the latent term is there.
    """
    terms = [energy_score(samples, targets, alpha)]
    for space in spaces:
        with torch.no_grad():
            target_images = space(targets[:scored_targets]).flatten(1, 2).float()
        terms.append(energy_score(space(samples).flatten(1, 2).float(), target_images, alpha))
    fidelity = torch.stack([term.fidelity.mean() for term in terms]).sum()
    diversity = torch.stack([term.diversity.mean() for term in terms]).sum()
    return EnergyLoss(fidelity - diversity, fidelity.detach(), diversity.detach())
