"""Stage benchmark_flops: params -> results/flops.json, the published table and this run's models.

FLOPs are counts and reproduce; the measured tokens a second go beside the stages' times, see ``runner.run.TIMINGS``.
"""

from pathlib import Path
from typing import Any

from calm_core.autoencoder.model import AutoencoderConfig
from calm_core.calm.model import CalmConfig
from calm_core.costs.flops import ModelFlops, calm_flops, encoder_parameters, transformer_flops
from calm_core.costs.matching import with_matched_steps
from calm_core.costs.run_shapes import RunShapes, run_shapes
from calm_core.costs.throughput import tokens_per_second
from calm_core.params import AutoencoderParams, LanguageModelParams, Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.storage.json_io import write_json
from calm_core.transformer.model import TransformerConfig
from stages.runner.places import Places
from stages.runner.run import Measured, run_stage

PUBLISHED_CONTEXT = 2048
PUBLISHED_SAMPLES = 8
PUBLISHED_TRAINING_TOKENS = 5.0e11


def main(params: Params) -> Measured:
    """Count, confirm with torch's counter, measure, write."""
    set_threads(params.runtime.threads)
    params = with_matched_steps(params)
    shapes = run_shapes(params)
    run = {**_run(params, shapes), "beside": {preset: _beside(params, preset) for preset in params.evaluation.beside}}
    write_json(Path("results/flops.json"), {"published": _published(), "run": run})
    device = choose_device(params.runtime.device)
    return tokens_per_second(params, shapes.calm, shapes.autoencoder, shapes.transformer, device)


def _published() -> dict[str, Any]:
    transformer = transformer_flops(TransformerConfig(), PUBLISHED_CONTEXT)
    calm = calm_flops(CalmConfig(), AutoencoderConfig(), PUBLISHED_CONTEXT, PUBLISHED_SAMPLES)
    return {
        "transformer_s": _row(transformer, PUBLISHED_TRAINING_TOKENS),
        "calm_m": _row(calm, PUBLISHED_TRAINING_TOKENS),
        "training_saving": 1 - calm.training_per_token / transformer.training_per_token,
        "inference_saving": 1 - calm.inference_per_token / transformer.inference_per_token,
    }


def _run(params: Params, shapes: RunShapes) -> dict[str, Any]:
    sections: dict[str, AutoencoderParams | LanguageModelParams] = {
        "autoencoder": params.autoencoder,
        "calm": params.calm,
        "transformer": params.transformer,
    }
    analytic, counted = shapes.analytic_flops(), shapes.counted_flops()
    run: dict[str, Any] = {}
    for name, section in sections.items():
        # The autoencoder of calm.initial was trained elsewhere.
        trained = name != "autoencoder" or not params.calm.has_given_autoencoder
        tokens = section.training_tokens if trained else 0
        run[name] = {
            **_row(getattr(analytic, name), tokens),
            "steps": section.steps if trained else 0,
            "training_tokens": tokens,
            "counted_training_flops": getattr(counted, name).training_per_token * tokens,
            "measured_inference_flops_per_token": getattr(counted, name).inference_per_token,
        }
    autoencoder, calm, transformer = run["autoencoder"], run["calm"], run["transformer"]
    # Beside the count and not in it: the paper's accounting leaves the frozen encoder out (section 6), and the training
    # of the autoencoder, which is some 2 % of its CALM-M's and far more of a small run's.
    needed = params.calm.needs_autoencoder
    calm["encoder_flops_per_token"] = (
        2 * encoder_parameters(shapes.autoencoder) / shapes.autoencoder.patch_size if needed else 0.0
    )
    # All that CALM takes, in the paper's accounting and as torch counts, and how the baseline's compares.
    for key in ("training_flops", "counted_training_flops"):
        calm[f"{key}_with_autoencoder"] = calm[key] + (autoencoder[key] if needed else 0)
        transformer[f"{key}_over_calm_with_autoencoder"] = transformer[key] / calm[f"{key}_with_autoencoder"]
    return run


def _beside(params: Params, preset: str) -> dict[str, Any]:
    """The CALM of ``preset``, on the same autoencoder and beside the same Transformer."""
    params = Places(preset=preset).params(params)
    found: dict[str, Any] = _run(params, run_shapes(params))["calm"]
    return found


def _row(flops: ModelFlops, training_tokens: float) -> dict[str, float]:
    return {
        "parameters": flops.parameters,
        "training_flops": flops.training_per_token * training_tokens,
        "inference_flops_per_token": flops.inference_per_token,
    }


if __name__ == "__main__":
    run_stage("benchmark_flops", main)
