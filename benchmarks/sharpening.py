"""`python -m benchmarks.sharpening`: what text below temperature 1 costs, and how far it is from P^(1/T) / Z.

For a CALM that samples latents, at T = 0.5, three tables:
- seconds a patch over those of plain sampling, in turns, medians of the ratios, and how much of the decoder ran;
- total variation on known distributions, where every symbol's probability is written out. Latents there have a softmax
  each; both samplers draw from the same P, so that N counted draws stand beside M weighted latents;
- total variation on the model, each sampler to its own target. The distribution is a pool of draws, 20,000 patches or
  1,024 latents, that a sampler takes some of without replacement, and the target is what all pairs of the pool give: a
  known distribution, exactly. A sampler's distribution is the mean over many runs of the weights that it gives.
"""

import itertools
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from benchmarks.generation import PATCH_SIZE, VOCABULARY, models, positions_decoded
from benchmarks.measure import alternately, median_ratio
from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.inference.decoding import Prompts, Sampling, align_prompts, calm_steps
from calm_core.inference.equal_patches import equal_patches
from calm_core.inference.softmax_temperature import softmax_temperature
from calm_core.inference.temperature import batch_temperature

TEMPERATURE = 0.5
PROMPT, STEPS, ROUNDS = 64, 8, 5
DRAWS, LATENTS = (200, 100, 64, 32), (16, 24, 32, 64)
CONTEXTS, POOL, POOL_OF_LATENTS, RUNS = 12, 20_000, 1024, 150
KNOWN_RUNS = 20_000


def main() -> None:
    """Print the three tables."""
    torch.set_num_threads(1)
    calm, autoencoder, weights = models()
    print(f"weights {weights}, T {TEMPERATURE}")
    with torch.no_grad():
        ratios(calm, autoencoder)
        known_distances()
        model_distances(calm, autoencoder)


def ratios(calm: Calm, autoencoder: Autoencoder) -> None:
    """Time of a patch over that of a plain one, at batch 1 and 16."""
    choices = [*(Sampling(TEMPERATURE, draws=draws) for draws in DRAWS)]
    choices += [Sampling(TEMPERATURE, "softmax", latents=latents) for latents in LATENTS]
    for batch in (1, 16):
        plain = partial(_generate, calm, autoencoder, Sampling(), batch)
        for sampling in choices:
            pairs = alternately(partial(_generate, calm, autoencoder, sampling, batch), plain, ROUNDS)
            print(f"batch {batch}, {_named(sampling)}: {median_ratio(pairs):.2f} times a plain patch")
    print(f"positions decoded of {PATCH_SIZE} a draw, N 200: {_positions(calm, autoencoder):.2f}")


def known_distances() -> None:
    """Mean total variation over contexts of different flatness, by the number of latents."""
    generator = torch.Generator().manual_seed(0)
    for name, kinds, sharpness in (("peaked", 6, 6.0), ("flat", 60, 6.0), ("flat, soft decoder", 60, 2.0)):
        logits = sharpness * torch.randn(8, kinds, 3, 5, generator=generator)
        probabilities = logits.softmax(dim=-1)
        symbols = torch.tensor(list(itertools.product(range(5), repeat=3)))
        of_latents = torch.stack([probabilities[:, :, k, symbols[:, k]] for k in range(3)]).prod(dim=0)
        target = (of_latents.mean(dim=1).log().double() / TEMPERATURE).softmax(dim=-1)

        def draw_logits(rows: Tensor, count: int, logits: Tensor = logits) -> Tensor:
            drawn = torch.randint(logits.shape[1], (count, len(rows)), generator=generator)
            return logits[rows % 8, drawn]

        def draw(rows: Tensor, count: int, draw_logits: Callable[..., Tensor] = draw_logits) -> Tensor:
            drawn = draw_logits(rows, count).softmax(dim=-1)
            uniform = torch.rand(*drawn.shape[:-1], 1, generator=generator)
            return (drawn.cumsum(dim=-1) < uniform).sum(dim=-1).clamp(max=4)

        def distance(found: Tensor, target: Tensor = target) -> float:
            numbers = (found * 5 ** torch.arange(3).flip(0)).sum(dim=1)
            of_kind = [torch.bincount(numbers[kind::8], minlength=125) / (KNOWN_RUNS / 8) for kind in range(8)]
            return float((torch.stack(of_kind) - target).abs().sum(dim=1).mean() / 2)

        noise = (target * (1 - target) / (KNOWN_RUNS / 8)).sqrt().sum(dim=1).mean().item() * 0.4
        print(f"known, {name}: Z {of_latents.mean(dim=1).square().sum(dim=1).mean():.3f}, an exact sample {noise:.3f}")
        for number in DRAWS[::-1]:
            counted = batch_temperature(draw, KNOWN_RUNS, TEMPERATURE, generator, draws=number)
            print(f"  batch N {number}: {distance(counted.symbols):.3f}")
        for number in LATENTS:
            options = {"latents": number, "rows_at_once": 800}
            weighed = softmax_temperature(draw_logits, KNOWN_RUNS, TEMPERATURE, generator, **options)
            print(f"  softmax M {number}: {distance(weighed.symbols):.3f}")


def model_distances(calm: Calm, autoencoder: Autoencoder) -> None:
    """Total variation in contexts of the model's own text, by sampler."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = _contexts(calm, autoencoder, generator)
    head = calm.latent_head
    distances: dict[str, list[float]] = {}
    for state in hidden_states:
        latents = head.sample(state[None], head.sampling_draws((POOL, 1), generator))[:, 0]
        of_pool = torch.unique(autoencoder.decode(latents), dim=0, return_inverse=True)[1]
        counts = torch.bincount(of_pool).double()
        agreeing = counts * (counts - 1)
        if not agreeing.any():
            print("model: no two patches of a pool are equal, so that it has no target", flush=True)
            continue
        target = agreeing / agreeing.sum()
        for number in DRAWS:
            found, _ = _counted_distance(of_pool, target, partial(_all_of, number), generator)
            distances.setdefault(f"batch N {number}", []).append(found)
        for name, rule in STOPPING.items():
            found, draws = _counted_distance(of_pool, target, rule, generator)
            distances.setdefault(name, []).append(found)
            distances.setdefault(f"draws of {name}", []).append(draws)
        weighed = _weighed_distances(autoencoder.logits(latents[:POOL_OF_LATENTS]).softmax(dim=-1), generator)
        for number, found in weighed.items():
            distances.setdefault(f"softmax M {number}", []).append(found)
        flatness = float(agreeing.sum()) / POOL / (POOL - 1)
        told = ", ".join(f"{name} {values[-1]:.2f}" for name, values in distances.items())
        print(f"model, Z {flatness:.2e}: {told}", flush=True)
    for name, values in distances.items():
        print(f"model, mean of {len(values)} contexts, {name}: {sum(values) / len(values):.3f}")


def _counted_distance(
    of_pool: Tensor, target: Tensor, stop: Callable[[Tensor], int], generator: torch.Generator
) -> tuple[float, float]:
    """Total variation of counting, and its mean number of draws; ``stop`` says of draws in order how many to count."""
    weights, used = torch.zeros_like(target), 0.0
    frequencies = torch.bincount(of_pool).double() / len(of_pool)
    for _ in range(RUNS):
        some = of_pool[torch.randperm(len(of_pool), generator=generator)[: DRAWS[0]]]
        taken = stop(some)
        found, counts = some[:taken].unique(return_counts=True)
        pairs = (counts * (counts - 1)).double()
        used += taken / RUNS
        if pairs.sum():
            weights[found] += pairs / pairs.sum() / RUNS
        else:  # one of the draws, any: its distribution is known
            weights += frequencies / RUNS
    return float((target - weights).clamp(min=0).sum()), used


def _all_of(number: int, draws: Tensor) -> int:
    return number


def _pairs(draws: Tensor) -> int:
    counts = draws.unique(return_counts=True)[1]
    return int((counts * (counts - 1)).sum()) // 2


def _stop_at_pairs(enough: int, draws: Tensor) -> int:
    """After each block of 20, whether so many pairs are equal."""
    return next((taken for taken in range(20, len(draws), 20) if _pairs(draws[:taken]) >= enough), len(draws))


def _stop_without_pairs(first: int, draws: Tensor) -> int:
    """After the ``first``, if no two of them are equal: Z is then likely small, and more draws would find few pairs."""
    return len(draws) if _pairs(draws[:first]) else first


STOPPING: dict[str, Callable[[Tensor], int]] = {
    "stop at the first pair": partial(_stop_at_pairs, 1),
    "stop at 10 pairs": partial(_stop_at_pairs, 10),
    "stop at 100 without a pair": partial(_stop_without_pairs, 100),
}
"""Rules that end the drawing before N 200; what is counted then is counted as ever."""


def _weighed_distances(probabilities: Tensor, generator: torch.Generator) -> dict[int, float]:
    """Total variation of pairs of M latents, by M, from pairs of the whole pool [latents, K, vocabulary].

    On the symbols that both find likely, each by itself, and all others together: never more than the whole distance.
    """
    agreement = torch.ones(len(probabilities), len(probabilities))
    for position in range(PATCH_SIZE):
        agreement *= probabilities[:, position] @ probabilities[:, position].T
    agreement.fill_diagonal_(0)
    pairs = torch.multinomial(agreement.flatten() / agreement.sum(), 1000, replacement=True, generator=generator)
    product = probabilities[pairs // len(agreement)] * probabilities[pairs % len(agreement)]
    drawn = torch.multinomial(product.flatten(0, 1), 1, generator=generator).view(-1, PATCH_SIZE)
    likely = torch.unique(torch.cat([drawn, probabilities.argmax(dim=-1)]), dim=0)
    of_latents = torch.stack([probabilities[:, k, likely[:, k]] for k in range(PATCH_SIZE)]).prod(dim=0).double()

    def of_pairs(some: Tensor) -> Tensor:
        own = of_latents[some]
        return (own.sum(dim=0).square() - own.square().sum(dim=0)) / agreement[some][:, some].double().sum()

    target = of_pairs(torch.arange(len(agreement)))
    found = {}
    for number in LATENTS:
        runs = RUNS * LATENTS[-1] // number
        subsets = (torch.randperm(len(agreement), generator=generator)[:number] for _ in range(runs))
        mean = torch.stack([of_pairs(some) for some in subsets]).mean(dim=0)
        others = max(0.0, float(mean.sum() - target.sum()))
        found[number] = float((target - mean).clamp(min=0).sum()) + others
    return found


def _contexts(calm: Calm, autoencoder: Autoencoder, generator: torch.Generator) -> Tensor:
    """Hidden states [contexts, hidden] behind texts that the model wrote at T."""
    prompts = align_prompts([[(7 * row) % VOCABULARY] for row in range(CONTEXTS)], PATCH_SIZE, 0)
    steps = calm_steps(calm, autoencoder, prompts, Sampling(TEMPERATURE), generator)
    written = torch.cat([prompts.token_ids, *(step.token_ids for step in islice(steps, 12))], dim=1)
    return calm(calm.inputs(written.unflatten(-1, (-1, PATCH_SIZE)), autoencoder))[:, -1]


def _positions(calm: Calm, autoencoder: Autoencoder) -> float:
    """Positions a draw that the batch sampler decodes to find equal patches, over the model's contexts."""
    generator = torch.Generator().manual_seed(0)
    states = _contexts(calm, autoencoder, generator)
    head = calm.latent_head
    latents = head.sample(states, head.sampling_draws((200, len(states)), generator))
    decoded = positions_decoded(partial(equal_patches, autoencoder, latents))
    return decoded / latents[..., 0].numel()


def _generate(calm: Calm, autoencoder: Autoencoder, sampling: Sampling, batch: int) -> None:
    prompts: Prompts = align_prompts(
        [[(7 * row + column) % VOCABULARY for column in range(PROMPT)] for row in range(batch)], PATCH_SIZE, 0
    )
    for _ in islice(calm_steps(calm, autoencoder, prompts, sampling, torch.Generator().manual_seed(0)), STEPS):
        pass


def _named(sampling: Sampling) -> str:
    return f"softmax M {sampling.latents}" if sampling.sampler == "softmax" else f"batch N {sampling.draws}"


if __name__ == "__main__":
    main()
