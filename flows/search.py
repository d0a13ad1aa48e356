"""A search for optimiser settings: the same space, sampler and number of trials for CALM and the Transformer.

Notable:
- the space is one constant for both models, two decades around centres that are the same for both;
- the first trial is what params.yaml says, so that a search never ends worse than it began;
- a proposal is drawn from (seed, number of trials done) and what these scored: a search that goes on proposes what one
  in a single go would have, and both models begin with the same random trials;
- trials are kept in SQLite by Optuna; one that was interrupted is run again at the same place of the space.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

RATES = {
    "learning_rate": (3e-4, 3e-2),
    "embedding_learning_rate": (1e-2, 1.0),
    "muon_learning_rate": (2e-3, 2e-1),
}
"""Peak learning rates, searched on a logarithmic scale."""
WARMUP_SHARE = (0.0, 0.25)
"""Steps of warm-up in those of the training."""

RANDOM_TRIALS = 8
"""Drawn from the whole space, that of params.yaml among them; the rest are proposed by what scored best."""
DIGITS = 3
"""Significant digits of a proposal, so that a setting can be written down."""


def settings_of(section: dict[str, Any], steps: int) -> dict[str, float]:
    """The place in the space that a section of params.yaml with ``steps`` steps stands for."""
    return {**{name: section[name] for name in RATES}, "warmup_share": section["warmup_steps"] / steps}


def overrides_of(model: str, settings: dict[str, float], steps: int) -> list[str]:
    """``settings`` as overrides of the section ``model`` of params.yaml for a training of ``steps`` steps."""
    rates = [f"{model}.{name}={_rounded(settings[name])}" for name in RATES]
    return [*rates, f"{model}.warmup_steps={round(settings['warmup_share'] * steps)}"]


def study_name(model: str, compared: dict[str, Any]) -> str:
    """Of the trials that can be compared with each other: those of ``model`` with the same ``compared``, plain JSON."""
    return f"{model}-{hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:8]}"


def search(
    database: Path,
    name: str,
    first: dict[str, float],
    trials: int,
    seed: int,
    score: Callable[[int, dict[str, float]], float | None],
) -> list[dict[str, Any]]:
    """Do what is missing of ``trials`` trials of the study ``name`` in ``database``; returns a row for each.

    ``score`` takes a trial's number and settings and returns what is maximised, or None where the training diverged:
    such a trial counts as the worst. What it raises ends the search, and that trial is the first of the next one.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{database}", study_name=name, direction="maximize", load_if_exists=True
    )
    while len(done := _done(study)) < trials:
        unfinished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
        number, settings = (
            (unfinished[0].number, unfinished[0].params) if unfinished else _propose(study, len(done), first, seed)
        )
        value = score(number, settings)
        # A trial without a score is as good as the worst; one that failed would be left out of what is learnt.
        state = optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE
        study.tell(number, value, state=state)
    return [{"trial": trial.number, **_rounded_all(trial.params), "brierlm": trial.value} for trial in done[:trials]]


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest score, the earliest of equals.

    Raises:
        ValueError: no trial has a score.
    """
    scored = [row for row in rows if row["brierlm"] is not None]
    if not scored:
        raise ValueError("no trial has a score: every training diverged")
    return max(scored, key=lambda row: row["brierlm"])


def _done(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED])


def _propose(study: "optuna.Study", done: int, first: dict[str, float], seed: int) -> tuple[int, dict[str, float]]:
    from optuna.distributions import FloatDistribution
    from optuna.samplers import TPESampler

    # A sampler has a state that the database does not keep, so each proposal gets one of its own.
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {done}".encode()).digest()[:4], "big")
    study.sampler = TPESampler(seed=drawn, n_startup_trials=RANDOM_TRIALS)
    if not done:
        study.enqueue_trial(first)
    rates = {name: FloatDistribution(low, high, log=True) for name, (low, high) in RATES.items()}
    trial = study.ask({**rates, "warmup_share": FloatDistribution(*WARMUP_SHARE)})
    return trial.number, trial.params


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rounded_all(settings: dict[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in settings.items()}
