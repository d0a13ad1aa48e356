"""Stage evaluate_brierlm: the scores of all trained models -> results/brierlm.json, both kinds compared over seeds."""

from pathlib import Path
from typing import Any

from calm_core.evaluation.intervals import estimate_brierlm, estimate_difference
from calm_core.evaluation.scores import estimate_by_place, mean_of_seeds, read_scores
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from stages.runner.places import RUN, Places
from stages.runner.run import run_stage

STAGE = "evaluate_brierlm"
MODELS = ("calm", "transformer")


def main(params: Params) -> None:
    """Gather the scores of every seed and compare."""
    resamples = params.evaluation.bootstrap_resamples
    seeds = {params.seed: RUN} | {seed: Places(seed) for seed in params.evaluation.seeds}
    scores = {model: [read_scores(places.scores(model)) for places in seeds.values()] for model in MODELS}
    results: dict[str, Any] = {}
    for model, of_seeds in scores.items():
        draws = generator(params.seed, STAGE, "bootstrap")
        estimate = estimate_brierlm([one.documents for one in of_seeds], resamples, draws)
        by_place = estimate_by_place([one.places for one in of_seeds], estimate, resamples, draws)
        means = mean_of_seeds([one.summary for one in of_seeds])
        results[model] = {
            **estimate._asdict(),
            **{key: value for key, value in means.items() if key not in estimate._fields},
            **by_place,
            **_temperatures([one.summary for one in of_seeds]),
            "seeds": list(seeds),
            "brierlm_of_seeds": [one.summary["brierlm"] for one in of_seeds],
        }
        told = _told(estimate.brierlm_ci95)
        print(f"{model}: BrierLM {estimate.brierlm:.2f}{told} over {estimate.positions:,} positions")
    calm, transformer = ([one.documents for one in scores[model]] for model in MODELS)
    difference = estimate_difference(calm, transformer, resamples, generator(params.seed, STAGE, "difference"))
    write_json(Path("results/brierlm.json"), {**results, "calm_minus_transformer": difference._asdict()})
    chance = "" if difference.p is None else f", p {difference.p:.3g}"
    print(
        f"CALM - Transformer: {difference.difference:.2f}{_told(difference.difference_ci95)}{chance}, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    )


def _temperatures(summaries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of CALM's decoder, that of each seed: no model has their mean."""
    key = "decoder_temperature"
    return {key: [one[key] for one in summaries]} if key in summaries[0] else {}


def _told(interval: list[float] | None) -> str:
    return " [{:.2f}, {:.2f}]".format(*interval) if interval else ""


if __name__ == "__main__":
    run_stage(STAGE, main)
