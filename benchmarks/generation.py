"""Generation: CALM against the Transformer of the same backbone, and low temperature against plain sampling.

Default shapes; both have key/value caches, and tokens a second are compared over the same number of tokens. Weights are
those of the default run where models/ holds them, since how often samples agree decides what low temperature costs.
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
from calm_core.transformer.model import Transformer, TransformerConfig

PROMPT, TOKENS, SHARPENED_TOKENS = 64, 192, 64
"""Of a text: read, written by plain sampling (up to a context of 256), written at low temperature."""
DRAWS, BATCH = 200, 16
VOCABULARY, PATCH_SIZE = 4096, 4
BACKBONE = BackboneConfig(128, 344, 4, 4, 4)


def generation() -> list[Result]:
    """CALM K 4 at T 1, batch 1 and 16, against the Transformer."""
    calm, autoencoder, weights = models()
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(TransformerConfig(VOCABULARY, BACKBONE))
    transformer.initialise(generator)
    results = []
    for batch in (1, 16):
        tokens, patches = _prompts(batch, 1), _prompts(batch)
        pairs = alternately(
            partial(_run, partial(transformer_steps, transformer, tokens, Sampling(), generator), TOKENS),
            partial(_run, partial(calm_steps, calm, autoencoder, patches, Sampling(), generator), TOKENS // PATCH_SIZE),
        )
        transformer_seconds, seconds = medians(pairs)
        details = {
            "tokens_per_second": batch * TOKENS / seconds,
            "transformer_tokens_per_second": batch * TOKENS / transformer_seconds,
            "weights": weights,
        }
        name = f"generation, CALM K {PATCH_SIZE} at T 1, batch {batch}"
        ratio = median_ratio(pairs)
        results.append(Result(name, "the Transformer with its cache", ratio, "times the tokens/s", ">=", 3, details))
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
