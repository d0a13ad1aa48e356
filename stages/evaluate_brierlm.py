"""Stage evaluate_brierlm: the scores of all trained models -> results/brierlm.json, all compared over seeds."""

from pathlib import Path
from typing import Any

from calm_core.evaluation.intervals import estimate_brierlm, estimate_difference
from calm_core.evaluation.scores import Scores, estimate_by_place, mean_of_seeds, read_scores
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from stages.runner.places import Places
from stages.runner.run import run_stage

STAGE = "evaluate_brierlm"
MODELS = ("calm", "transformer")


def main(params: Params) -> None:
    """Gather the scores of every seed and compare."""
    presets = params.evaluation.beside
    scores = {model: _of_seeds(params, model) for model in MODELS}
    beside = {preset: _of_seeds(params, "calm", preset) for preset in presets}
    results: dict[str, Any] = {model: _estimate(params, model, of_seeds) for model, of_seeds in scores.items()}
    of_presets = {preset: _estimate(params, f"calm ({preset})", of_seeds) for preset, of_seeds in beside.items()}
    difference = _minus_transformer(params, "CALM", scores["calm"], scores["transformer"])
    for preset, of_seeds in beside.items():
        found = _minus_transformer(params, f"CALM ({preset})", of_seeds, scores["transformer"])
        of_presets[preset]["minus_transformer"] = found
    write_json(Path("results/brierlm.json"), {**results, "calm_minus_transformer": difference, "beside": of_presets})


def _of_seeds(params: Params, model: str, preset: str | None = None) -> list[Scores]:
    """The scores of ``model``, or of the CALM of ``preset``, one a seed, the run's own first."""
    return [read_scores(Places(seed, preset).scores(model)) for seed in (None, *params.evaluation.seeds)]


def _estimate(params: Params, name: str, of_seeds: list[Scores]) -> dict[str, Any]:
    """What the seeds of one model say together."""
    resamples, draws = params.evaluation.bootstrap_resamples, generator(params.seed, STAGE, "bootstrap")
    estimate = estimate_brierlm([one.documents for one in of_seeds], resamples, draws)
    by_place = estimate_by_place([one.places for one in of_seeds], estimate, resamples, draws)
    means = mean_of_seeds([one.summary for one in of_seeds])
    told = _told(estimate.brierlm_ci95)
    print(f"{name}: BrierLM {estimate.brierlm:.2f}{told} over {estimate.positions:,} positions")
    return {
        **estimate._asdict(),
        **{key: value for key, value in means.items() if key not in estimate._fields},
        **by_place,
        **_temperatures([one.summary for one in of_seeds]),
        "seeds": [params.seed, *params.evaluation.seeds],
        "brierlm_of_seeds": [one.summary["brierlm"] for one in of_seeds],
    }


def _minus_transformer(params: Params, name: str, of_seeds: list[Scores], transformer: list[Scores]) -> dict[str, Any]:
    first, second = ([one.documents for one in model] for model in (of_seeds, transformer))
    # The same draws of text for every model that is compared.
    draws = generator(params.seed, STAGE, "difference")
    difference = estimate_difference(first, second, params.evaluation.bootstrap_resamples, draws)
    chance = "" if difference.p is None else f", p {difference.p:.3g}"
    seeds = len(of_seeds)
    print(
        f"{name} - Transformer: {difference.difference:.2f}{_told(difference.difference_ci95)}{chance}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
    return difference._asdict()


def _temperatures(summaries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of CALM's decoder, that of each seed: no model has their mean."""
    key = "decoder_temperature"
    return {key: [one[key] for one in summaries]} if key in summaries[0] else {}


def _told(interval: list[float] | None) -> str:
    return " [{:.2f}, {:.2f}]".format(*interval) if interval else ""


if __name__ == "__main__":
    run_stage(STAGE, main)
