"""Which trainings the study has: K, widths and budgets in factors of two, as many as fit into the hours given.

Rules, the same for both models:
- a budget is FLOPs of the language model's own training, as ``costs/flops.py`` counts them, and sets its steps. The
  autoencoder of a K is trained once, as params.yaml says, and shared by the points of that K; at small budgets it costs
  more than they do, so it is charged on the page, in full, beside the count without it. A CALM with a token head needs
  none and is charged nothing, though the pipeline trains one;
- everything else is params.yaml's: optimiser, context, batch, learning rates. A batch is halved as long as a training
  would have fewer than ``FEWEST_STEPS`` steps, and the rates go with its square root, as the noise of a mean over it
  does (Malladi et al., 2022, for Adam). Warm-up is a share of the steps, and then the rates fall linearly
  to zero: a whole training for each point, none read off the middle of another;
- a width scales hidden and intermediate size and the number of heads of both language models alike, and with them the
  sizes of a token head;
- a budget at a width is taken for all models or for none: first two decades of budgets at the width of params.yaml,
  then the other widths over that half of these budgets where they may be the best one, small budgets for narrow models
  and large ones for wide models, then budget after budget upwards. More hours take more of this list, never another.

How long a point takes is estimated from training steps measured on this machine, so that a faster machine gets larger
budgets by the same command.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from calm_core.costs.flops import ModelFlops
from calm_core.costs.run_shapes import run_shapes
from calm_core.costs.throughput import tokens_per_second
from calm_core.errors import CalmError
from calm_core.evaluation.likelihood import SAMPLES
from calm_core.params import CalmParams, LanguageModelParams, Params, TransformerParams, load_params
from calm_core.runtime.device import choose_device
from calm_core.runtime.machine import describe_machine
from calm_core.runtime.precision import set_threads
from calm_core.study.point import TRANSFORMER, Point, calm

CORE_BUDGETS = 8
"""Budgets that come before other widths: a factor of 128, two decades and a little."""

FEWEST_STEPS = 100
"""With fewer the batch is halved instead."""

WARMUP_SHARE = 0.07
"""Of the steps; about what params.yaml has for both models."""

EVALUATION_TOKENS = 40_000
"""Held-out tokens for every point."""

SHORTER_CONTEXTS = 1.5
"""Times as many tokens are evaluated, a quarter as many again at each of two shorter contexts."""

OTHER_SPLIT = 1.25
"""Times as many tokens are sampled for the bound of CALM's likelihood, a quarter of them to choose a temperature by."""

RATES = ("learning_rate", "embedding_learning_rate", "muon_learning_rate")
"""Of params.yaml, which go with the square root of the batch."""

SIZES = ("intermediate_size", "token_hidden_size", "token_intermediate_size")
"""Of params.yaml, which go with the hidden size."""

FEWEST_CHECKPOINTS = 3
"""Of either model: the study reads none of them, and the schema has no fewer."""

POINT_SECONDS = 30.0
"""A point without its training and the sampling of its evaluation: a copy, the starts of its stages, DVC."""

AUTOENCODER_SECONDS = 40.0
"""An autoencoder without its training: encoding the corpus, and the starts of two stages."""

STEP_SHARE = 0.75
"""Of the measured speed is left in a training: reading batches, the optimiser and the curve take the rest."""

NARROW_SHARE = 0.7
"""Of the FLOPs a second is left at half the width: small operators wait more."""


class Rates(NamedTuple):
    """FLOPs a second in training at the width of params.yaml."""

    transformer: float
    calm: dict[int, float]
    """For each K."""


class Row(NamedTuple):
    """One budget at one width, for all models."""

    budget: float
    width: float
    """Factor of the width of params.yaml."""


def rows(smallest: float, widths: Sequence[float]) -> Iterator[Row]:
    """All rows there could be, the most important first; they never end. ``widths[0]`` comes first.

    Each other width begins at the end of the core budgets where it is likeliest to be the best: the best width rises
    with the budget (Hoffmann et al., 2022), and elsewhere a training would take as long and say nothing of a frontier.
    """
    first, half = widths[0], CORE_BUDGETS // 2
    for exponent in range(CORE_BUDGETS):
        yield Row(smallest * 2**exponent, first)
    for width in widths[1:]:
        from_the_end = range(half) if width < first else range(CORE_BUDGETS - 1, half - 1, -1)
        for exponent in from_the_end:
            yield Row(smallest * 2**exponent, width)
    for exponent in count(CORE_BUDGETS):
        for width in widths:
            if width >= first:
                yield Row(smallest * 2**exponent, width)


def plan_study(
    params: Params,
    rates: Rates,
    hours: float,
    smallest: float,
    patch_sizes: Sequence[int],
    widths: Sequence[float],
    seeds: int,
    further: Sequence[str] = (),
) -> list[Point]:
    """The points whose planned time fits into ``hours``, those of small budgets first.

    ``smallest`` is the smallest budget in FLOPs; each point is repeated under ``seeds`` seeds, from ``params.seed`` on;
    ``further`` are overrides that all points have.

    Raises:
        CalmError: not even the first row fits, or a number is not positive.
    """
    for name, value in (("hours", hours), ("smallest budget", smallest), ("seeds", seeds)):
        if not value > 0:
            raise CalmError(f"{name} is {value}; it must be above 0")
    if not patch_sizes or not widths or min(widths) <= 0:
        raise CalmError(f"K {list(patch_sizes)} and widths {list(widths)}: the study needs one of each, above 0")
    shapes = {
        (model, width): _shape(params, model, width)
        for width in widths
        for model in (TRANSFORMER, *map(calm, patch_sizes))
    }
    # Once for each K and seed, whatever else is chosen.
    once = {
        calm(size): AUTOENCODER_SECONDS + shapes[calm(size), widths[0]].autoencoder / (STEP_SHARE * rates.calm[size])
        for size in patch_sizes
    }
    spent = seeds * sum(once.values())
    chosen: list[tuple[Row, Point]] = []
    for row in rows(smallest, widths):
        of_row = [
            _point(params, shape, row.budget, rates, params.seed + repeat, further)
            for (_, width), shape in shapes.items()
            if width == row.width
            for repeat in range(seeds)
        ]
        spent += sum(point.planned_seconds for point in of_row)
        if spent > 3600 * hours:
            break
        chosen += [(row, point) for point in of_row]
    if not chosen:
        raise CalmError(f"hours is {hours}; the smallest budget for all models already takes {spent / 3600:.2f}")
    # Stable: within a budget the width of params.yaml comes first, and the models in their order.
    chosen.sort(key=lambda pair: (pair[0].budget, widths.index(pair[0].width)))
    points: list[Point] = []
    for _, point in chosen:
        # The first point of a K trains the autoencoder for all of them.
        first = not any((point.model, point.seed) == (other.model, other.seed) for other in points)
        extra = once.get(point.model, 0.0) if first else 0.0
        points.append(replace(point, planned_seconds=point.planned_seconds + extra))
    return points


class _Shape(NamedTuple):
    model: str
    section: LanguageModelParams
    """As scaled."""
    patch_size: int | None
    width: float
    flops: ModelFlops
    autoencoder: float
    """FLOPs of the training of the autoencoder of this K, whether the model has latents or not."""


def _shape(params: Params, model: str, width: float) -> _Shape:
    size = params.autoencoder.patch_size if model == TRANSFORMER else int(model.removeprefix("calm-"))
    shaped = _shaped(params, size, width)
    context = shaped.calm.context_tokens
    if context % size or context < 2 * size:
        raise CalmError(f"K is {size}; calm.context_tokens {context} must hold two patches or more of it")
    flops = run_shapes(shaped).analytic_flops()
    if model == TRANSFORMER:
        return _Shape(model, shaped.transformer, None, width, flops.transformer, 0.0)
    autoencoder = flops.autoencoder.training_per_token * shaped.autoencoder.training_tokens
    return _Shape(model, shaped.calm, size, width, flops.calm, autoencoder)


def _shaped(params: Params, patch_size: int, width: float) -> Params:
    return params.model_copy(
        update={
            "autoencoder": params.autoencoder.model_copy(update={"patch_size": patch_size}),
            "calm": _scaled(params.calm, width),
            "transformer": _scaled(params.transformer, width),
        }
    )


def _scaled(section: CalmParams | TransformerParams, width: float) -> LanguageModelParams:
    """``section`` at ``width`` times its width: heads stay as large as they are, there are more or fewer of them."""
    heads = max(1, round(section.heads * width))
    # Whole heads, and the other sizes in proportion to what that makes of the width.
    hidden_size = heads * (section.hidden_size // section.heads)
    shared = max(1, section.heads // section.key_value_heads)
    sizes = [key for key in SIZES if hasattr(section, key)]
    return section.model_copy(
        update={
            "hidden_size": hidden_size,
            **{key: max(1, round(getattr(section, key) * hidden_size / section.hidden_size)) for key in sizes},
            "heads": heads,
            "key_value_heads": heads // shared if heads % shared == 0 else heads,
        }
    )


def _point(params: Params, shape: _Shape, budget: float, rates: Rates, seed: int, further: Sequence[str]) -> Point:
    section, name = shape.section, TRANSFORMER if shape.patch_size is None else "calm"
    batch = section.batch_sequences
    per_sequence = shape.flops.training_per_token * section.context_tokens
    parts = params.runtime.processes * params.runtime.gradient_accumulation
    while batch // 2 >= parts and batch // 2 % parts == 0 and budget / (batch * per_sequence) < FEWEST_STEPS:
        batch //= 2
    steps = max(FEWEST_CHECKPOINTS, round(budget / (batch * per_sequence)))
    settings: dict[str, Any] = {
        f"{name}.{key}": getattr(section, key)
        for key in ("hidden_size", *SIZES, "heads", "key_value_heads")
        if hasattr(section, key)
    }
    settings |= {
        f"{name}.batch_sequences": batch,
        f"{name}.steps": steps,
        f"{name}.warmup_steps": round(WARMUP_SHARE * steps),
        f"{name}.schedule": "linear",
        f"{name}.checkpoints": FEWEST_CHECKPOINTS,
    }
    smaller = math.sqrt(batch / section.batch_sequences)
    settings |= {f"{name}.{key}": float(f"{smaller * getattr(section, key):.6g}") for key in RATES}
    if shape.patch_size is not None:
        settings["autoencoder.patch_size"] = shape.patch_size
    settings |= {"evaluation.tokens": EVALUATION_TOKENS, "seed": seed}
    trained = per_sequence * batch * steps
    rate = STEP_SHARE * (rates.transformer if shape.patch_size is None else rates.calm[shape.patch_size])
    # Wider is faster, if anything; what is not known is not counted on.
    rate *= min(1.0, NARROW_SHARE + (1 - NARROW_SHARE) * (2 * shape.width - 1))
    # The score asks for the next four tokens, so patches of fewer than four are sampled one after another.
    patches = 1 if shape.patch_size is None else max(1, 4 // shape.patch_size)
    sampled = SHORTER_CONTEXTS * EVALUATION_TOKENS * params.evaluation.samples * patches
    has_latents = isinstance(section, CalmParams) and section.needs_autoencoder
    if has_latents:
        sampled += OTHER_SPLIT * params.evaluation.likelihood_tokens * SAMPLES[-1]
    evaluated = sampled * shape.flops.inference_per_token
    return Point(
        model=shape.model,
        hidden_size=section.hidden_size,
        budget=budget,
        seed=seed,
        overrides=[*(f"{key}={value}" for key, value in settings.items()), *further],
        parameters=shape.flops.parameters,
        training_tokens=steps * batch * section.context_tokens,
        training_flops=trained,
        autoencoder_flops=shape.autoencoder if has_latents else 0.0,
        inference_flops_per_token=shape.flops.inference_per_token,
        planned_seconds=POINT_SECONDS + (trained + evaluated) / rate,
    )


def measure_rates(params: Params, patch_sizes: Sequence[int]) -> Rates:
    """Training FLOPs a second of the shapes of ``params`` on this machine, each K in turn; some seconds each."""
    set_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    found: dict[int, float] = {}
    baseline: list[float] = []
    for size in patch_sizes:
        shaped = _shaped(params, size, 1.0)
        shapes = run_shapes(shaped)
        speeds = tokens_per_second(shaped, shapes.calm, shapes.autoencoder, shapes.transformer, device)
        flops = shapes.analytic_flops()
        found[size] = speeds["calm_training_tokens_per_second"] * flops.calm.training_per_token
        baseline.append(speeds["transformer_training_tokens_per_second"] * flops.transformer.training_per_token)
    # The fastest: what other work on the machine took away is not the machine's.
    return Rates(max(baseline), found)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """For ./params.yaml: ``plan_study``'s arguments -> points, the rates they rest on, and facts of the machine."""
    params = load_params(Path("params.yaml"))
    known = asked.pop("rates")
    rates = (
        Rates(known["transformer"], {int(size): rate for size, rate in known["calm"].items()})
        if known
        else measure_rates(params, asked["patch_sizes"])
    )
    points = plan_study(params, rates, **asked)
    return {
        "machine": describe_machine(),
        "rates": rates._asdict(),
        "points": [point.as_json() for point in points],
    }


if __name__ == "__main__":
    try:
        # One line, the last one, so that what libraries print before it does no harm.
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except CalmError as error:
        sys.exit(str(error))
