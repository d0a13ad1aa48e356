"""The autoencoder: K tokens <-> one latent vector (paper, section 2).

Notable:
- context-free: every patch is coded on its own, without attention;
- half of the layers work token by token, half on the whole patch ("squeeze" and "expand" in between);
- the decoder's output matrix is the encoder's embedding;
- the KL divergence is clipped from below in each dimension, without which most dimensions collapse;
- dropout on input tokens and on the sampled latent makes the latent space smooth and redundant.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_core.nn.block_sizes import rows_at_once
from calm_core.nn.cross_entropy import BLOCK_LOGITS, LEAST_ROWS, projected_cross_entropy
from calm_core.nn.draws import Draws
from calm_core.nn.largest import largest
from calm_core.nn.layers import ResidualSwiGLU, initialise, rms_norm
from calm_core.nn.limits import HalvedLayers, PatchSize, VocabularySize, Width


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; the defaults are the published ones (75 M parameters)."""

    vocabulary_size: VocabularySize = 128_256
    patch_size: PatchSize = 4
    hidden_size: Width = 512
    intermediate_size: Width = 1280
    latent_size: Width = 128
    encoder_layers: HalvedLayers = 2
    decoder_layers: HalvedLayers = 2


class Posterior(NamedTuple):
    """The diagonal normal distribution of a patch's latent; both tensors [..., latent]."""

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise for standard normal ``noise`` of the same shape (or one that broadcasts)."""
        return self.mean + self.log_std.exp() * noise


class Encoder(nn.Module):
    """Token ids [..., K] -> Posterior of [..., latent]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        # Of an odd number, the patch half has one layer more in the encoder, and the token half in the decoder.
        per_token = config.encoder_layers // 2
        self.embedding = nn.Embedding(config.vocabulary_size, hidden_size)
        self.token_layers = _layers(config, per_token)
        self.squeeze = nn.Linear(config.patch_size * hidden_size, hidden_size)
        self.patch_layers = _layers(config, config.encoder_layers - per_token)
        self.norm = rms_norm(hidden_size)
        self.to_posterior = nn.Linear(hidden_size, 2 * config.latent_size)

    def forward(self, token_ids: Tensor) -> Posterior:
        return self.posterior(self.token_states(token_ids))

    def token_states(self, token_ids: Tensor) -> Tensor:
        """The states of ``token_ids`` [...] before the squeeze, [..., hidden]: functions of the token alone."""
        return self.token_layers(self.embedding(token_ids))

    def posterior(self, token_states: Tensor) -> Posterior:
        """Posterior of the patches whose tokens have these states, [..., K, hidden]."""
        # Under autocast a linear gives bf16; the residual stream and its norms stay in float32.
        hidden_states = self.patch_layers(self.squeeze(token_states.flatten(-2)).float())
        # The logarithm of the std: any output of a linear is valid, none has to be clamped.
        mean, log_std = self.to_posterior(self.norm(hidden_states)).float().chunk(2, dim=-1)
        return Posterior(mean, log_std)


class Decoder(nn.Module):
    """Latents [..., latent] -> hidden states [..., K, hidden], ready for the output matrix."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        per_patch = config.decoder_layers // 2
        self.patch_size = config.patch_size
        self.from_latent = nn.Linear(config.latent_size, hidden_size)
        self.patch_layers = _layers(config, per_patch)
        self.expand = nn.Linear(hidden_size, config.patch_size * hidden_size)
        self.token_layers = _layers(config, config.decoder_layers - per_patch)
        self.norm = rms_norm(hidden_size)

    def forward(self, latents: Tensor) -> Tensor:
        hidden_states = self.expand(self.patch_layers(self.from_latent(latents).float()))
        hidden_states = hidden_states.float().unflatten(-1, (self.patch_size, -1))
        return self.norm(self.token_layers(hidden_states))


class Autoencoder(nn.Module):
    """Encoder and decoder around one embedding matrix."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw fresh weights from ``generator``."""
        # The embedding is the output matrix too, where unit logits need 1 / sqrt(hidden).
        initialise(self, generator, embedding_std=self.config.hidden_size**-0.5)

    def encode(self, token_ids: Tensor) -> Posterior:
        """Posterior of the latents, each [..., latent] float32, of patches of token ids [..., K]."""
        return self.encoder(token_ids)

    def hidden_states(self, latents: Tensor) -> Tensor:
        """The decoder's last hidden states, [..., K, hidden], of latents [..., latent]."""
        return self.decoder(latents)

    def logits(self, latents: Tensor) -> Tensor:
        """Scores of every token, [..., K, vocabulary], of latents [..., latent]."""
        # The embedding is the output matrix too (section 2).
        return F.linear(self.decoder(latents), self.encoder.embedding.weight)

    def decode(self, latents: Tensor) -> Tensor:
        """The most probable token ids, [..., K] int64, of latents [..., latent].

        Some patches at a time, so that their logits are still in the processor's cache when they are compared.
        """
        # Logits of K positions a patch, each of vocabulary size.
        patch_size = self.config.patch_size
        of_patch = patch_size * self.config.vocabulary_size
        patches = rows_at_once(of_patch, latents.device, BLOCK_LOGITS, -(-LEAST_ROWS // patch_size))
        flat = latents.reshape(-1, latents.shape[-1])
        # Made before the logits: a result that is allocated after them and stays would keep the allocator from using
        # their memory again, and each block would take more.
        token_ids = torch.empty(len(flat), patch_size, dtype=torch.int64, device=latents.device)
        for first in range(0, len(flat), patches):
            logits = self.logits(flat[first : first + patches]).flatten(0, 1)
            token_ids[first : first + patches] = largest(logits).view(-1, patch_size)
        return token_ids.view(*latents.shape[:-1], patch_size)


class AutoencoderLoss(NamedTuple):
    """Scalars; ``total`` = K * ``cross_entropy`` + kl_weight * ``kl``, averaged over patches."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


class AutoencoderDraws(NamedTuple):
    """Randomness of one training step over P patches.

    ``noise`` [P, latent] standard normal; ``token_uniform`` [P, K] and ``latent_uniform`` [P, latent]
    uniform in [0, 1), below the dropout probability where an entry is dropped.
    """

    noise: Tensor
    token_uniform: Tensor
    latent_uniform: Tensor


def draw(config: AutoencoderConfig, patches: int, draws: Draws) -> AutoencoderDraws:
    """What ``autoencoder_loss`` needs for ``patches`` patches a row of ``draws``, row after row."""
    # The names are part of what a seed means.
    return AutoencoderDraws(
        noise=draws.normal("noise", patches, config.latent_size).flatten(0, 1),
        token_uniform=draws.uniform("token dropout", patches, config.patch_size).flatten(0, 1),
        latent_uniform=draws.uniform("latent dropout", patches, config.latent_size).flatten(0, 1),
    )


def clipped_kl(posterior: Posterior, kl_clamp: float) -> Tensor:
    """KL(posterior || Normal(0, 1)) a patch, [...]: each dimension clipped from below, then summed.

    A dimension costs (mean^2 + std^2 - 1) / 2 - log_std, or ``kl_clamp`` if that is more; ``kl_clamp`` 0
    leaves the divergence as it is, since it is never negative.
    """
    mean, log_std = posterior
    # exp(2 log_std) is the variance.
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
    # A dimension below the clamp has no gradient ("free bits"), so nothing pulls it into the prior. Clamped before any
    # average: each patch keeps its own free bits.
    return kl.clamp(min=kl_clamp).sum(dim=-1)


def autoencoder_loss(
    model: Autoencoder,
    token_ids: Tensor,
    draws: AutoencoderDraws,
    *,
    kl_weight: float = 0.001,
    kl_clamp: float = 0.5,
    token_dropout: float = 0.15,
    latent_dropout: float = 0.15,
) -> AutoencoderLoss:
    """Training objective over patches of token ids [P, K] (paper, section 2).

    Dropped input tokens become id 0, dropped latent entries 0 with the others scaled up by 1 / (1 - p);
    the targets stay whole.
    """
    # Id 0 as published; in this project's own tokenizers it is the padding token, which no text contains.
    kept_ids = token_ids.masked_fill(draws.token_uniform < token_dropout, 0)
    posterior = model.encode(kept_ids)
    # Scaled up, as torch's own dropout does, so that the latent has the same mean without dropout.
    kept = (draws.latent_uniform >= latent_dropout).float() / (1 - latent_dropout)
    hidden_states = model.hidden_states(posterior.sample(draws.noise) * kept).flatten(0, -2)
    cross_entropy = projected_cross_entropy(hidden_states, model.encoder.embedding.weight, token_ids.flatten())
    kl = clipped_kl(posterior, kl_clamp).mean()
    # Cross entropy is a mean over tokens, KL a sum over a patch's dimensions: times K, both count a patch.
    total = model.config.patch_size * cross_entropy + kl_weight * kl
    return AutoencoderLoss(total, cross_entropy.detach(), kl.detach())


def _layers(config: AutoencoderConfig, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualSwiGLU(config.hidden_size, config.intermediate_size) for _ in range(count)))
