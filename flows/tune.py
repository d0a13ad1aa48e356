"""The flow `tune`: one search for optimiser settings of CALM and the Transformer, by BrierLM on the validation split.

Both models get the same number of trials, the same space and the same share of their training's steps. A trial is a run
of `reproduce` in a copy with the same cache, so that it trains the one model and nothing else; it leaves no experiment.
The best of each model is trained in full and kept as one, beside what params.yaml says, trained in full as well.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import Timeout
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from calm_core.errors import CalmError
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.lock import acquire
from calm_core.storage.yaml_io import read_yaml
from flows.reproduce import ROOT, reproduce
from flows.search import RATES, WARMUP_SHARE, best_of, overrides_of, search, settings_of, study_name

Model = Literal["calm", "transformer"]


class Tuned(NamedTuple):
    """The stages of a model, and the metric that is maximised, named as ``read_metrics`` names it."""

    inputs: tuple[str, ...]
    """Stages that every trial shares."""
    training: str
    evaluation: str
    metric: str


MODELS: dict[str, Tuned] = {
    "calm": Tuned(("encode_corpus",), "train_calm", "evaluate_calm", "calm: brierlm"),
    "transformer": Tuned(
        ("tokenise", "match_compute"), "train_transformer", "evaluate_transformer", "transformer: brierlm"
    ),
}

STEPS = Path("data/transformer_steps.json")
"""What the stage match_compute writes."""

ALWAYS = ("evaluation.split=validation", "evaluation.seeds=[]", "evaluation.beside=[]")
"""Overrides of every trial: the test split is not looked at, and nothing is trained but the model itself, once."""


@flow(name="tune", flow_run_name="tune {trials} trials at {budget} of the steps")
def tune(
    models: list[Model] = ["calm", "transformer"],  # noqa: B006 - Prefect shows it in the UI, and nothing changes it
    trials: int = 20,
    budget: float = 0.25,
    seed: int = 0,
    stages_at_once: int = 2,
    folder: str | None = None,
) -> dict[str, Any]:
    """Search for learning rates and warm-up of both models under equal rules; returns what results/tune/*.json hold.

    Trials that were done with the same params, budget and seed before count, so that a search goes on where it ended.

    Args:
        models: Which to tune.
        trials: How many trials each model gets; the first is what params.yaml says.
        budget: The share of a training's steps that a trial takes, above 0 and at most 1.
        seed: Of the sampler.
        stages_at_once: How many stages of a trial may run at the same time.
        folder: The repository; by default the one that this file lies in.
    """
    if trials < 1 or not 0 < budget <= 1:
        raise CalmError(f"trials is {trials} and budget {budget}; use 1 trial or more, and a budget above 0, at most 1")
    logger, root = get_run_logger(), Path(folder or ROOT).resolve()
    results = root / "results/tune"
    results.mkdir(parents=True, exist_ok=True)
    try:
        held = acquire(results / "study.lock")
    except Timeout:
        raise CalmError(f"another tune flow works in {results}; wait for it or cancel it") from None
    with held:
        # In the tree itself, so that no trial has to.
        reproduce(
            targets=sorted({stage for model in models for stage in MODELS[model].inputs}),
            at_once=stages_at_once,
            folder=str(root),
        )
        for model in models:
            result = _tune(model, root, trials, budget, seed, stages_at_once)
            write_json(results / f"{model}.json", result)
            create_table_artifact(
                [*result["trials"], *result["in_full"]], key=f"tune-{model}", description=f"Trials of {model}."
            )
            logger.info(f"{model}: {json.dumps(result['in_full'])}")
    found = {model: read_json(path) for model in MODELS if (path := results / f"{model}.json").is_file()}
    (results / "trials.md").write_text(trials_table(found), encoding="utf-8")
    logger.info(f"wrote {results}/*.json and trials.md; `dvc exp show` lists {', '.join(map(_experiment, models))}")
    return {model: found[model] for model in models}


def trials_table(results: dict[str, Any]) -> str:
    """The results of both models, by name, as Markdown."""
    low, high = WARMUP_SHARE
    lines = [
        "Search space of both models: "
        + "; ".join(f"{name} {span[0]:g} to {span[1]:g}, log-uniform" for name, span in RATES.items())
        + f"; warm-up {low:.0%} to {high:.0%} of the steps, uniform.",
    ]
    for model, result in results.items():
        lines += [
            "",
            f"### {model}: {len(result['trials'])} trials of {result['steps']:,} steps",
            "",
            f"| trial | {' | '.join(RATES)} | warm-up steps | BrierLM, validation |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        best = best_of(result["trials"])["trial"]
        lines += [
            _row("params.yaml" if row["trial"] == 0 else str(row["trial"]), row, result["steps"], row["trial"] == best)
            for row in result["trials"]
        ]
        lines += [_row(f"{row['trial']}, in full", row, result["full_steps"]) for row in result["in_full"]]
    return "\n".join(lines) + "\n"


def _row(name: str, row: dict[str, Any], steps: int, best: bool = False) -> str:
    score = "diverged" if row["brierlm"] is None else f"{row['brierlm']:.3f}"
    cells = [name, *(f"{row[rate]:g}" for rate in RATES), str(round(row["warmup_share"] * steps))]
    return f"| {' | '.join([*cells, f'**{score}**' if best else score])} |"


def _tune(model: Model, root: Path, trials: int, budget: float, seed: int, stages_at_once: int) -> dict[str, Any]:
    logger, tuned = get_run_logger(), MODELS[model]
    params = read_yaml(root / "params.yaml")
    full_steps = params[model]["steps"]
    if full_steps == "match":
        full_steps = read_json(root / STEPS)["steps"]
    steps = max(1, round(budget * full_steps))
    first = settings_of(params[model], full_steps)

    def run(overrides: list[str], experiment: str | None) -> float | None:
        state: State[Any] = reproduce(
            [*ALWAYS, *overrides],
            targets=[tuned.evaluation],
            at_once=stages_at_once,
            folder=str(root),
            experiment=experiment,
            keep=experiment is not None,
            return_state=True,
        )
        if state.is_failed() and f"failed: {tuned.training};" in str(state.message):
            return None
        # Whatever else is wrong is wrong for every trial.
        return float(state.result()[tuned.metric])

    def score(number: int, settings: dict[str, float]) -> float | None:
        overrides = overrides_of(model, settings, steps)
        value = run([f"{model}.steps={steps}", *overrides], None)
        if value is None and number == 0:
            raise CalmError(f"{tuned.training} fails with what params.yaml says; mend that first")
        logger.info(f"{model}, trial {number + 1} of {trials}: BrierLM {value} with {' '.join(overrides)}")
        return value

    name = study_name(model, _compared(model, params, steps, seed))
    rows = search(root / "results/tune/study.db", name, first, trials, seed, score)
    best = best_of(rows)
    in_full = [
        {**first, "trial": "params.yaml", "brierlm": run([], None)},
        {**best, "trial": "best", "brierlm": run(overrides_of(model, best, full_steps), _experiment(model))},
    ]
    return {
        "study": name,
        "split": "validation",
        "budget": budget,
        "steps": steps,
        "full_steps": full_steps,
        "trials": rows,
        "best": {"trial": best["trial"], "overrides": overrides_of(model, best, full_steps)},
        "in_full": in_full,
    }


def _experiment(model: str) -> str:
    return f"tune-{model}-best"


def _compared(model: str, params: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """What all trials of a study have in common: what its scores depend on, and its first trial and sampler."""
    evaluation = {key: value for key, value in params["evaluation"].items() if key not in ("seeds", "beside", "split")}
    return {
        "steps": steps,
        "sampler": seed,
        "seed": params["seed"],
        "precision": params["runtime"]["precision"],
        "evaluation": evaluation,
        # Of the autoencoder the Transformer's score has the positions: after every K tokens.
        "autoencoder": params["autoencoder"] if model == "calm" else params["autoencoder"]["patch_size"],
        **{section: params[section] for section in ("corpus", "tokenizer", model)},
    }


if __name__ == "__main__":
    tune()
