"""Training steps of the three models against what the machine multiplies: analytic FLOPs a second over its matrix rate.

The rate is that of products of 1024 x 1024 matrices, taken between the steps, in the faster of float32 and bfloat16: on
a machine without bfloat16 units that is float32, which a step reaches less easily than an emulated bfloat16. A
step is all of it: forward, backward, clipping and AdamW, the published optimiser.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, alternately, seconds_of
from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior, autoencoder_loss, draw
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm, CalmConfig
from calm_core.costs.flops import calm_flops, decoder_parameters, encoder_parameters, transformer_flops
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import TrainingParams
from calm_core.runtime.precision import autocast
from calm_core.training.loop import update_weights
from calm_core.training.optimisers import build_optimisers
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

MATRIX_SIZE = 1024
MATRIX_FLOPS = 2 * MATRIX_SIZE**3
CPU = torch.device("cpu")


class Step(NamedTuple):
    """One training step and the FLOPs that the paper's accounting gives it."""

    run: Callable[[], None]
    flops: float


def matrix_rate(dtype: torch.dtype) -> Callable[[], None]:
    """A product of two ``MATRIX_SIZE``-cubed matrices, into memory that is there already."""
    first, second = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    product = torch.empty_like(first)

    def multiply() -> None:
        torch.mm(first, second, out=product)

    return multiply


def fastest_dtype() -> torch.dtype:
    """The faster of float32 and bfloat16 in matrix products on this machine."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        multiply = matrix_rate(dtype)
        multiply()
        seconds[dtype] = seconds_of(multiply)
    return min(seconds, key=lambda dtype: seconds[dtype])


def calm_step(
    shape: BackboneConfig, head: EnergyHeadConfig, coder: AutoencoderConfig, patches: int, batch: int
) -> Step:
    """A step of CALM with the published loss (N 8, M 100) on ``batch`` sequences of ``patches`` patches."""
    generator = torch.Generator().manual_seed(0)
    config = CalmConfig(coder.vocabulary_size, coder.patch_size, coder.latent_size, shape, head)
    model = Calm(config)
    model.initialise(generator)
    token_ids = torch.randint(config.vocabulary_size, (batch, patches, config.patch_size), generator=generator)
    positions = batch * patches
    posterior = Posterior(*torch.randn(2, positions, config.latent_size, generator=generator))
    objective = HeadObjective(samples=8, target_samples=100)

    def loss() -> Tensor:
        draws = model.latent_head.training_draws(positions, objective, GeneratorDraws(generator))
        return model.latent_head.loss(model(token_ids).flatten(0, 1), posterior, draws, objective).total

    flops = calm_flops(config, coder, patches, objective.samples).training_per_token
    return Step(_step(model, loss), flops * token_ids.numel())


def transformer_step(shape: BackboneConfig, vocabulary_size: int, context: int, batch: int) -> Step:
    """A step of the Transformer on ``batch`` sequences of ``context`` tokens."""
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig(vocabulary_size, shape)
    model = Transformer(config)
    model.initialise(generator)
    token_ids = torch.randint(vocabulary_size, (batch, context + 1), generator=generator)
    flops = transformer_flops(config, context).training_per_token
    return Step(_step(model, lambda: next_token_loss(model, token_ids)), flops * batch * context)


def autoencoder_step(config: AutoencoderConfig, patches: int) -> Step:
    """A step of the autoencoder on ``patches`` patches."""
    generator = torch.Generator().manual_seed(0)
    model = Autoencoder(config)
    model.initialise(generator)
    token_ids = torch.randint(config.vocabulary_size, (patches, config.patch_size), generator=generator)

    def loss() -> Tensor:
        return autoencoder_loss(model, token_ids, draw(config, patches, GeneratorDraws(generator))).total

    flops = 3 * 2 * (encoder_parameters(config) + decoder_parameters(config))
    return Step(_step(model, loss), flops * patches)


def large_calm() -> Step:
    """D 512, I 1376, 8 layers, K 4, B 4, V 8192, L 128, 512 patches of context, 2 sequences."""
    coder = AutoencoderConfig(vocabulary_size=8192)
    return calm_step(BackboneConfig(512, 1376, 8, 8, 8), EnergyHeadConfig(), coder, patches=512, batch=2)


def large_transformer() -> Step:
    """The same backbone, 1024 tokens of context, 2 sequences."""
    return transformer_step(BackboneConfig(512, 1376, 8, 8, 8), 8192, context=1024, batch=2)


def published_autoencoder() -> Step:
    """The published shape with V 8192, 512 patches."""
    return autoencoder_step(AutoencoderConfig(vocabulary_size=8192), patches=512)


def small_calm() -> Step:
    """D 128, I 344, 4 layers, B 2, V 4096, L 64, 64 patches of context, 32 sequences."""
    coder = AutoencoderConfig(vocabulary_size=4096, latent_size=64)
    return calm_step(BackboneConfig(128, 344, 4, 4, 4), EnergyHeadConfig(blocks=2), coder, patches=64, batch=32)


def small_transformer() -> Step:
    """The same backbone, 256 tokens of context, 32 sequences."""
    return transformer_step(BackboneConfig(128, 344, 4, 4, 4), 4096, context=256, batch=32)


def training_steps() -> list[Result]:
    """All five steps."""
    dtype = fastest_dtype()
    cases: list[tuple[str, Callable[[], Step], float]] = [
        ("CALM, D 512", large_calm, 0.6),
        ("Transformer, D 512", large_transformer, 0.6),
        ("autoencoder, published shape", published_autoencoder, 0.5),
        ("CALM, D 128", small_calm, 0.3),
        ("Transformer, D 128", small_transformer, 0.3),
    ]
    return [_against_matrix_rate(f"training step of {name}", build(), goal, dtype) for name, build, goal in cases]


def _against_matrix_rate(name: str, step: Step, goal: float, dtype: torch.dtype) -> Result:
    # As many products as make up the step, so that both last about as long.
    count = max(1, round(step.flops / MATRIX_FLOPS))
    multiply = matrix_rate(dtype)

    def multiply_often() -> None:
        for _ in range(count):
            multiply()

    pairs = alternately(step.run, multiply_often)
    shares = [step.flops / own / (count * MATRIX_FLOPS / rate) for own, rate in pairs]
    rates = [count * MATRIX_FLOPS / rate for _, rate in pairs]
    details = {
        "shares": shares,
        "step_seconds": statistics.median(own for own, _ in pairs),
        "step_flops": step.flops,
        "matrix_flops_per_second": statistics.median(rates),
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    yardstick = f"{MATRIX_SIZE}-cubed products in {details['matrix_dtype']}"
    return Result(name, yardstick, statistics.median(shares), "of the matrix rate", ">=", goal, details)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    adamw = TrainingParams.model_construct(
        optimiser="adamw", learning_rate=3e-4, embedding_learning_rate=3e-4, weight_decay=0.1
    )
    optimisers = build_optimisers(model, adamw)

    def run() -> None:
        with autocast("auto", CPU):
            value = loss()
        value.backward()
        update_weights(model, optimisers, gradient_clip=1.0)

    return run
