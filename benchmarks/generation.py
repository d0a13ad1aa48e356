"""Generation: CALM against the Transformer beside it, and low temperature against plain sampling.

Both have key/value caches, and tokens a second are compared over the same number of tokens. At default shapes weights
are those of the default run where its folders hold them, since how often samples agree decides what low temperature
costs. At the published shapes they are random: the time of a step does not depend on them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Result, alternately, median_ratio, medians
from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHeadConfig
from calm_core.costs.flops import calm_flops, decoder_parameters
from calm_core.inference import equal_patches
from calm_core.inference.decoding import Prompts, Sampling, Step, align_prompts, calm_steps, transformer_steps
from calm_core.nn.backbone import BackboneConfig
from calm_core.storage.model_folder import load_model
from calm_core.transformer.model import Transformer, TransformerConfig

PROMPT, TOKENS, SHARPENED_TOKENS = 64, 192, 64
"""Of a text: read, written by plain sampling (up to a context of 256), written at low temperature."""
PUBLISHED_TOKENS = 16
DRAWS, BATCH = 200, 16
GOALS = {1: 3.5, 16: 4.0}
"""Texts together, and how many times the Transformer's tokens a second CALM should write."""
DEFAULT_CALM, DEFAULT_TRANSFORMER = Path("models/calm"), Path("models/transformer")
VOCABULARY, PATCH_SIZE = 4096, 4
BACKBONE = BackboneConfig(128, 344, 4, 4, 4)


def generation() -> list[Result]:
    """At T 1, batch 1 and 16: the paper's CALM on the same backbone as a Transformer, and the pair of the default run.

    Each model with the threads that serve it, as ``calm generate`` has them.
    """
    calm, autoencoder, weights = models()
    transformer = Transformer(TransformerConfig(VOCABULARY, BACKBONE))
    transformer.initialise(torch.Generator().manual_seed(0))
    results = _compared("energy head, D 128", calm, autoencoder, transformer, TOKENS, weights)
    if (DEFAULT_CALM / "model.safetensors").is_file():
        default, no_autoencoder = load_calm(DEFAULT_CALM)
        baseline = load_model(Transformer, DEFAULT_TRANSFORMER)
        results += _compared("the default run", default, no_autoencoder, baseline, TOKENS, "of the default run")
    return results


def published_generation() -> list[Result]:
    """CALM-M against Transformer-S, whose BrierLM the paper finds comparable; memory: 3 GB."""
    generator = torch.Generator().manual_seed(0)
    calm, autoencoder, transformer = (
        Calm(CalmConfig()),
        Autoencoder(AutoencoderConfig()),
        Transformer(TransformerConfig()),
    )
    for model in (calm, autoencoder, transformer):
        model.initialise(generator)
    return _compared(
        "CALM-M", calm, autoencoder, transformer, PUBLISHED_TOKENS, "random", "Transformer-S with its cache"
    )


def _compared(
    name: str,
    calm: Calm,
    autoencoder: Autoencoder | None,
    transformer: Transformer,
    tokens: int,
    weights: str,
    yardstick: str = "the Transformer with its cache",
) -> list[Result]:
    """Tokens a second of ``calm`` over those of ``transformer``, ``tokens`` a text."""
    generator, results = torch.Generator().manual_seed(0), []
    for batch, goal in GOALS.items():
        single, patches = _prompts(batch, 1), _prompts(batch)
        pairs = alternately(
            partial(_run, partial(transformer_steps, transformer, single, Sampling(), generator), tokens),
            partial(_run, partial(calm_steps, calm, autoencoder, patches, Sampling(), generator), tokens // PATCH_SIZE),
        )
        transformer_seconds, seconds = medians(pairs)
        details = {
            "tokens_per_second": batch * tokens / seconds,
            "transformer_tokens_per_second": batch * tokens / transformer_seconds,
            "weights": weights,
        }
        line = f"generation, {name}, K {PATCH_SIZE} at T 1, batch {batch}"
        results.append(Result(line, yardstick, median_ratio(pairs), "times the tokens/s", ">=", goal, details))
    return results


def temperature() -> list[Result]:
    """The batch sampler with N 200 at T 1/2 and 1/3, batch 16, against plain sampling."""
    calm, autoencoder, weights = models()
    generator, prompts = torch.Generator().manual_seed(0), _prompts(BATCH)
    steps = SHARPENED_TOKENS // PATCH_SIZE
    plain = partial(_run, partial(calm_steps, calm, autoencoder, prompts, Sampling(), generator), steps)
    results = []
    for exponent in (2, 3):
        sampling = Sampling(1 / exponent, draws=DRAWS)
        sharpened = partial(_run, partial(calm_steps, calm, autoencoder, prompts, sampling, generator), steps)
        positions = positions_decoded(sharpened) / (DRAWS * BATCH * steps)
        pairs = alternately(sharpened, plain)
        seconds, plain_seconds = medians(pairs)
        details = {
            "seconds_per_patch": seconds / steps,
            "plain_seconds_per_patch": plain_seconds / steps,
            "positions_decoded_of_a_draw": positions,
            "times_the_flops": times_the_flops(calm, autoencoder, DRAWS, positions),
            "weights": weights,
        }
        name = f"batch temperature sampling, N {DRAWS}, T 1/{exponent}, batch {BATCH}"
        results.append(Result(name, "plain sampling", median_ratio(pairs), "times the time", "<=", 3, details))
    return results


def models() -> tuple[Calm, Autoencoder, str]:
    """CALM and its autoencoder, trained where ``make repro`` has run, and which weights they have."""
    folder = Path("beside/paper-objective/models/calm")
    if (folder / "model.safetensors").is_file():
        calm, autoencoder = load_calm(folder)
        assert autoencoder is not None
        return calm, autoencoder, "of the default run"
    generator = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(VOCABULARY, PATCH_SIZE, 96, 192, 64))
    calm = Calm(CalmConfig(VOCABULARY, PATCH_SIZE, 64, BACKBONE, EnergyHeadConfig(2)))
    autoencoder.initialise(generator)
    calm.initialise(generator)
    last = calm.latent_head.output[-1]  # type: ignore[attr-defined]
    with torch.no_grad():
        last.weight.normal_(0.0, 0.03, generator=generator)
    return calm, autoencoder, "random"


def _prompts(batch: int, patch_size: int = PATCH_SIZE) -> Prompts:
    return align_prompts(
        [[(7 * row + column) % VOCABULARY for column in range(PROMPT)] for row in range(batch)], patch_size, 0
    )


def times_the_flops(model: Calm, autoencoder: Autoencoder, draws: int, positions: float) -> float:
    """FLOPs of a patch chosen among ``draws`` samples over those of a plain one, the backbone's included in both.

    All samples pass through the head and the decoder's layers on patches, ``positions`` of the K tokens of each through
    the rest, on average; the patch that is chosen is decoded whole, as a plain one is.
    """
    config = model.config
    plain = calm_flops(config, autoencoder.config, PROMPT // PATCH_SIZE, 1).inference_per_token * PATCH_SIZE
    assert not isinstance(config.head, TokenHeadConfig)  # its patches are not chosen among samples
    sampling = config.head.sampling_weights(config.backbone.hidden_size, config.latent_size)
    # What is left of a decoder without positions is its work on the patch.
    one, two = (decoder_parameters(replace(autoencoder.config, patch_size=size)) for size in (1, 2))
    of_position, of_patch = two - one, 2 * one - two
    return 1 + 2 * ((draws - 1) * sampling + draws * (of_patch + positions * of_position)) / plain


def positions_decoded(sharpened: Callable[[], object]) -> int:
    """Of how many samples and positions ``sharpened`` looks for the token to find equal patches."""
    looked_at: list[int] = []
    real = equal_patches.tokens_at

    def counting(autoencoder: Autoencoder, patch_states: Tensor, position: int) -> Tensor:
        looked_at.append(len(patch_states))
        return real(autoencoder, patch_states, position)

    equal_patches.tokens_at = counting
    try:
        sharpened()
    finally:
        equal_patches.tokens_at = real
    return sum(looked_at)


def _run(begin: Callable[[], Iterator[Step]], steps: int) -> None:
    for _ in islice(begin(), steps):
        pass
