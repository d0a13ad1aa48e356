"""Stage benchmark_flops: params -> results/flops.json, the published table and this run's models.

FLOPs are counts and reproduce; the measured tokens a second go beside the stages' times, see ``runner.run.TIMINGS``.
"""

from pathlib import Path
from typing import Any

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
    encoder_parameters,
    transformer_flops,
)
from calm_core.costs.throughput import tokens_per_second
from calm_core.params import AutoencoderParams, LanguageModelParams, Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.storage.json_io import write_json
from calm_core.transformer.model import TransformerConfig
from calm_core.transformer.training import transformer_config
from stages.runner.run import Measured, run_stage

PUBLISHED_CONTEXT = 2048
PUBLISHED_SAMPLES = 8
PUBLISHED_TRAINING_TOKENS = 5.0e11


def main(params: Params) -> Measured:
    """Count, confirm with torch's counter, measure, write."""
    set_threads(params.runtime.threads)
    published = _published()
    run, shapes = _run(params)
    write_json(Path("results/flops.json"), {"published": published, "run": run})
    return tokens_per_second(params, *shapes, choose_device(params.runtime.device))


def _published() -> dict[str, Any]:
    transformer = transformer_flops(TransformerConfig(), PUBLISHED_CONTEXT)
    calm = calm_flops(CalmConfig(), AutoencoderConfig(), PUBLISHED_CONTEXT, PUBLISHED_SAMPLES)
    return {
        "transformer_s": _row(transformer, PUBLISHED_TRAINING_TOKENS),
        "calm_m": _row(calm, PUBLISHED_TRAINING_TOKENS),
        "training_saving": 1 - calm.training_per_token / transformer.training_per_token,
        "inference_saving": 1 - calm.inference_per_token / transformer.inference_per_token,
    }


def _run(params: Params) -> tuple[dict[str, Any], tuple[CalmConfig, AutoencoderConfig, TransformerConfig]]:
    vocabulary_size = params.tokenizer.vocabulary_size
    coder = autoencoder_config(params.autoencoder, vocabulary_size)
    calm = calm_config(params.calm, coder)
    transformer = transformer_config(params.transformer, vocabulary_size)
    # Only the energy head has a score to add.
    scored_targets = HeadObjective().scored_targets if params.calm.decoder_score and params.calm.head == "energy" else 0
    calm_shape = (params.calm.context_tokens // coder.patch_size, params.calm.samples, scored_targets)
    context = params.transformer.context_tokens
    rows: dict[str, tuple[ModelFlops, ModelFlops, AutoencoderParams | LanguageModelParams]] = {
        "autoencoder": (autoencoder_flops(coder), counted_autoencoder_flops(coder), params.autoencoder),
        "calm": (calm_flops(calm, coder, *calm_shape), counted_calm_flops(calm, coder, *calm_shape), params.calm),
        "transformer": (
            transformer_flops(transformer, context),
            counted_transformer_flops(transformer, context),
            params.transformer,
        ),
    }
    run: dict[str, Any] = {}
    for name, (analytic, counted, section) in rows.items():
        tokens = section.training_tokens
        run[name] = {
            **_row(analytic, tokens),
            "training_tokens": tokens,
            "counted_training_flops": counted.training_per_token * tokens,
            "measured_inference_flops_per_token": counted.inference_per_token,
        }
    # Beside the count and not in it: the paper's accounting leaves the frozen encoder out (section 6), and the training
    # of the autoencoder, which is some 2 % of its CALM-M's and far more of a small run's.
    run["calm"]["encoder_flops_per_token"] = 2 * encoder_parameters(coder) / coder.patch_size
    both = run["calm"]["training_flops"] + run["autoencoder"]["training_flops"]
    run["calm"]["training_flops_with_autoencoder"] = both
    return run, (calm, coder, transformer)


def _row(flops: ModelFlops, training_tokens: float) -> dict[str, float]:
    return {
        "parameters": flops.parameters,
        "training_flops": flops.training_per_token * training_tokens,
        "inference_flops_per_token": flops.inference_per_token,
    }


if __name__ == "__main__":
    run_stage("benchmark_flops", main)
