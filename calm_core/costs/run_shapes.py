"""The three models of a run, as the shapes that their FLOPs are counted from."""

from typing import NamedTuple

from calm_core.autoencoder.model import AutoencoderConfig
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import CalmConfig
from calm_core.calm.training import calm_config
from calm_core.costs.flops import (
    ModelFlops,
    autoencoder_flops,
    calm_flops,
    counted_autoencoder_flops,
    counted_calm_flops,
    counted_transformer_flops,
    transformer_flops,
)
from calm_core.params import CalmParams, Params
from calm_core.transformer.model import TransformerConfig
from calm_core.transformer.training import transformer_config


class RunFlops(NamedTuple):
    """FLOPs a token of each model."""

    autoencoder: ModelFlops
    calm: ModelFlops
    transformer: ModelFlops


class RunShapes(NamedTuple):
    """The models, and what else their FLOPs depend on."""

    autoencoder: AutoencoderConfig
    calm: CalmConfig
    transformer: TransformerConfig
    calm_context: int
    """In patches."""
    samples: int
    scored_targets: int
    transformer_context: int
    """In tokens."""

    def analytic_flops(self) -> RunFlops:
        """In the paper's accounting (section 6)."""
        return RunFlops(
            autoencoder_flops(self.autoencoder),
            calm_flops(self.calm, self.autoencoder, self.calm_context, self.samples, self.scored_targets),
            transformer_flops(self.transformer, self.transformer_context),
        )

    def counted_flops(self) -> RunFlops:
        """By torch's own counter."""
        return RunFlops(
            counted_autoencoder_flops(self.autoencoder),
            counted_calm_flops(self.calm, self.autoencoder, self.calm_context, self.samples, self.scored_targets),
            counted_transformer_flops(self.transformer, self.transformer_context),
        )


def run_shapes(params: Params) -> RunShapes:
    """Those of the run that ``params`` describe; the vocabulary is taken to be as large as they say."""
    vocabulary_size = params.tokenizer.vocabulary_size
    autoencoder = autoencoder_config(params.autoencoder, vocabulary_size)
    return RunShapes(
        autoencoder,
        calm_config(params.calm, autoencoder),
        transformer_config(params.transformer, vocabulary_size),
        params.calm.context_tokens // autoencoder.patch_size,
        params.calm.samples,
        scored_targets(params.calm),
        params.transformer.context_tokens,
    )


def scored_targets(section: CalmParams) -> int:
    """Targets a position whose decoder states are scored: none but by the energy head, which alone has a score."""
    return HeadObjective().scored_targets if section.decoder_score and section.head == "energy" else 0
