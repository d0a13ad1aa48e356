"""The search against a score whose best place is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calm_core.storage.yaml_io import read_yaml
from flows.search import RANDOM_TRIALS, RATES, WARMUP_SHARE, best_of, overrides_of, search, settings_of, study_name
from tests import ROOT

FIRST = {"learning_rate": 0.003, "embedding_learning_rate": 0.03, "muon_learning_rate": 0.02, "warmup_share": 0.05}
BEST = {"learning_rate": 0.0009, "embedding_learning_rate": 0.15, "muon_learning_rate": 0.04, "warmup_share": 0.1}


def decades(settings: dict[str, float]) -> float:
    """How far ``settings`` lie from the best ones."""
    return math.hypot(*(math.log10(settings[name] / BEST[name]) for name in RATES))


class Score:
    """A parabola in the logarithms of the rates; remembers what it was asked."""

    def __init__(self, fails_at: int = -1, diverges_above: float = 1.0) -> None:
        self.asked: list[dict[str, float]] = []
        self.fails_at, self.diverges_above = fails_at, diverges_above

    def __call__(self, number: int, settings: dict[str, float]) -> float | None:
        self.asked.append(dict(settings))
        if len(self.asked) - 1 == self.fails_at:
            raise KeyboardInterrupt
        return None if settings["learning_rate"] > self.diverges_above else 5.0 - decades(settings) ** 2


def run(folder: Path, trials: int, score: Score, name: str = "calm", seed: int = 0) -> list[dict[str, Any]]:
    return search(folder / "tune/study.db", name, FIRST, trials, seed, score)


def test_the_first_trial_is_the_present_and_the_best_is_near_the_best_place(tmp_path: Path) -> None:
    score = Score()
    rows = run(tmp_path, 20, score)
    assert score.asked[0] == FIRST
    assert [row["trial"] for row in rows] == list(range(20))
    assert best_of(rows)["brierlm"] >= rows[0]["brierlm"]
    # Nearer than the nearest of as many random places, in the median over a thousand times.
    generator = np.random.default_rng(0)
    corners = [np.log10(np.array([span[end] for span in RATES.values()]) / list(BEST.values())[:3]) for end in (0, 1)]
    random_places = generator.uniform(*corners, size=(1000, 20, 3))
    assert decades(best_of(rows)) < np.median(np.linalg.norm(random_places, axis=-1).min(axis=1))

    for settings in score.asked:
        assert all(low <= settings[name] <= high for name, (low, high) in RATES.items())
        assert WARMUP_SHARE[0] <= settings["warmup_share"] <= WARMUP_SHARE[1]
    assert len({settings["muon_learning_rate"] for settings in score.asked}) == 20


def test_trials_in_two_goes_are_those_of_one(tmp_path: Path) -> None:
    whole, parts = Score(), Score()
    expected = run(tmp_path / "one", 11, whole)
    run(tmp_path / "two", 9, parts)
    assert run(tmp_path / "two", 11, parts) == expected
    assert parts.asked == whole.asked
    # Nothing is missing any more.
    assert run(tmp_path / "two", 11, parts) == expected
    assert run(tmp_path / "two", 3, parts) == expected[:3]
    assert len(parts.asked) == 11


def test_an_interrupted_trial_is_run_again(tmp_path: Path) -> None:
    expected, interrupted, rest = Score(), Score(fails_at=2), Score()
    rows = run(tmp_path / "one", 4, expected)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", 4, interrupted)
    assert run(tmp_path / "two", 4, rest) == rows
    assert interrupted.asked[2] == rest.asked[0]
    assert interrupted.asked[:2] + rest.asked == expected.asked


def test_both_models_begin_with_the_same_places_and_have_studies_of_their_own(tmp_path: Path) -> None:
    calm, transformer, seeded = Score(), Score(), Score()
    run(tmp_path, 3, calm, "calm")
    run(tmp_path, 3, transformer, "transformer")
    run(tmp_path, 3, seeded, "calm again", seed=1)
    assert calm.asked == transformer.asked
    assert calm.asked[1:] != seeded.asked[1:]


@pytest.mark.slow
def test_a_diverged_trial_counts_and_is_learnt_from(tmp_path: Path) -> None:
    rows = run(tmp_path, 20, Score(diverges_above=0.0031))
    diverged = [row["trial"] for row in rows if row["brierlm"] is None]
    assert len(rows) == 20
    # Half of the space: of random trials half diverge, of later ones hardly any.
    assert len([trial for trial in diverged if trial < RANDOM_TRIALS]) >= 2
    assert len([trial for trial in diverged if trial >= RANDOM_TRIALS]) <= 2
    with pytest.raises(ValueError, match="no trial has a score"):
        best_of([{"brierlm": None}])


def test_settings_are_those_of_params_yaml_and_back() -> None:
    params = read_yaml(ROOT / "params.yaml")
    for model, steps in (("calm", params["calm"]["steps"]), ("transformer", 1445)):
        section = params[model]
        settings = settings_of(section, steps)
        rates = [f"{model}.{name}={section[name]}" for name in RATES]
        assert overrides_of(model, settings, steps) == [*rates, f"{model}.warmup_steps={section['warmup_steps']}"]
        # A trial of params.yaml is one of the space, for both models.
        assert all(low < settings[name] < high for name, (low, high) in RATES.items())
        assert WARMUP_SHARE[0] <= settings["warmup_share"] <= WARMUP_SHARE[1]
    # Proposals are written with three digits.
    written = overrides_of("calm", {**FIRST, "learning_rate": 0.00031622776}, 100)
    assert written[0] == "calm.learning_rate=0.000316"
    assert written[-1] == "calm.warmup_steps=5"


def test_a_study_is_of_what_can_be_compared() -> None:
    assert study_name("calm", {"steps": 70, "seed": 0}) == study_name("calm", {"seed": 0, "steps": 70})
    names = {study_name("calm", {"steps": 70}), study_name("calm", {"steps": 71}), study_name("x", {"steps": 70})}
    assert len(names) == 3
