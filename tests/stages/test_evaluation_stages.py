"""The figures of evaluate_brierlm and correlate_brierlm, of models in folders whose scores are known exactly."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

from calm_core.params import Params, parse_params
from calm_core.storage.checksum import sha256
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.storage.provenance import DESCRIPTION
from stages import correlate_brierlm, evaluate_brierlm, evaluate_calm, evaluate_transformer
from tests import ROOT
from tests.calm_core.known_models import (
    Expected,
    Place,
    bigram_transformer,
    chain_text,
    coin_calm,
    expected,
    moments_of_probabilities,
    moments_of_sampling,
    paths_of_bigrams,
    paths_of_patches,
    places,
    walk,
)

SIZE, CONTEXT_OF_CALM, CONTEXT_OF_TRANSFORMER, PATCH_SIZE = 4, 16, 12, 2
NEXT_PATCHES = [[[1, 2], [1, 0]], [[0, 1], [0, 2]], [[3, 2], [3, 0]], [[2, 3], [1, 3]]]
LENGTHS = [5, 1, 23, 2, 40, 7, 12, 3, 61, 1, 1, 18, 9, 30, 4, 27] * 2
TEXT = chain_text(walk(SIZE, 1), LENGTHS, 0.93, seed=9)
LIMIT, CHECKPOINT_LIMIT = 401, 250


@pytest.fixture()
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params of a project in the current folder, which has held-out tokens and no models yet."""
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    tokens = Path("data/tokens")
    tokens.mkdir(parents=True)
    TEXT.write(tokens, "validation", SIZE, documents_a_shard=5)
    (tokens / "tokenizer.json").write_text("{}")
    write_json(tokens / DESCRIPTION, {"sha256": {path.name: sha256(path) for path in tokens.iterdir()}})
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["runtime"]["threads"] = 1
    values["autoencoder"]["patch_size"] = PATCH_SIZE
    values["calm"]["context_tokens"] = CONTEXT_OF_CALM
    values["transformer"]["context_tokens"] = CONTEXT_OF_TRANSFORMER
    values["evaluation"] = {
        "seeds": [],
        "split": "validation",
        "samples": 4,
        "batch_sequences": 3,
        "tokens": LIMIT,
        "checkpoint_tokens": CHECKPOINT_LIMIT,
        "bootstrap_resamples": 500,
    }
    return parse_params(values)


def save(model: Any, folder: Path) -> None:
    save_model(model, None, folder, 8)
    (folder / "tokenizer.json").write_text("{}")


def of_walk(choices: int, limit: int) -> Expected:
    paths = paths_of_bigrams(walk(SIZE, choices))

    def moments(place: Place) -> Any:
        return moments_of_probabilities(paths(place.history), place.following, 1)

    return expected(places(TEXT, CONTEXT_OF_TRANSFORMER, PATCH_SIZE, limit), moments)


def cross_entropy(choices: int, limit: int) -> float:
    asked = places(TEXT, CONTEXT_OF_TRANSFORMER, 1, limit)
    table = walk(SIZE, choices)
    table = table / table.sum(axis=1, keepdims=True)
    return float(np.mean([-math.log(table[place.history[-1], place.following[0]]) for place in asked]))


def brierlm(brier: np.ndarray) -> float:
    assert np.all(brier > 0)
    return float(100 * np.prod(brier) ** 0.25)


def assert_interval(interval: list[float], wanted: Expected) -> None:
    """Near that of a bootstrap over documents by another generator; one over positions lies 5 % away."""
    sums, positions = wanted.mean, np.array(wanted.positions)
    draws = np.random.default_rng(0).integers(len(positions), size=(4000, len(positions)))
    brier = sums[draws].sum(axis=1) / positions[draws].sum(axis=1)[:, None]
    resampled = 100 * np.prod(np.maximum(brier, 0), axis=1) ** 0.25
    middle = brierlm(sums.sum(axis=0) / positions.sum())
    half_width = scipy.stats.t(len(positions) - 1).ppf(0.975) * resampled.std()
    assert interval == pytest.approx([middle - half_width, middle + half_width], rel=0.03)


def test_evaluate_brierlm(params: Params) -> None:
    model, autoencoder = coin_calm(NEXT_PATCHES)
    save(model, Path("models/calm"))
    save(autoencoder, Path("models/calm") / AUTOENCODER)
    save(bigram_transformer(walk(SIZE, 2)), Path("models/transformer"))
    for stage in (evaluate_calm, evaluate_transformer, evaluate_brierlm):
        stage.main(params)
    found = json.loads(Path("results/brierlm.json").read_text())
    assert list(found) == ["calm", "transformer", "calm_minus_transformer"]
    difference = found["calm_minus_transformer"]
    assert difference["difference"] == pytest.approx(found["calm"]["brierlm"] - found["transformer"]["brierlm"])
    low, high = difference["difference_ci95"]
    assert low < difference["difference"] < high
    score = ["brierlm", "brierlm_ci95", "brier", "positions", "documents"]
    where = ["split", "context_tokens", "stride_tokens", "blocks"]
    assert list(found["calm"]) == [*score, *where, "seeds", "brierlm_of_seeds"]
    assert list(found["transformer"]) == [*score, *where, "cross_entropy_nats", "seeds", "brierlm_of_seeds"]
    assert found["calm"]["seeds"] == [params.seed]

    wanted, transformer = of_walk(2, LIMIT), found["transformer"]
    assert (transformer["positions"], transformer["documents"]) == (sum(wanted.positions), len(wanted.document))
    assert transformer["positions"] == (LIMIT - 4) // 12 * 6
    assert (transformer["split"], transformer["context_tokens"], transformer["blocks"]) == ("validation", 12, 33)
    brier = wanted.mean.sum(axis=0) / sum(wanted.positions)
    assert transformer["brier"] == pytest.approx(brier, abs=1e-5)
    assert transformer["brierlm"] == pytest.approx(brierlm(brier), abs=1e-3)
    assert transformer["cross_entropy_nats"] == pytest.approx(cross_entropy(2, LIMIT), rel=1e-5)
    assert_interval(transformer["brierlm_ci95"], wanted)

    paths, calm = paths_of_patches(NEXT_PATCHES), found["calm"]
    asked = places(TEXT, CONTEXT_OF_CALM, PATCH_SIZE, LIMIT)
    wanted = expected(asked, lambda place: moments_of_sampling(paths(place.history), place.following, 4))
    assert (calm["positions"], calm["documents"]) == (sum(wanted.positions), len(wanted.document))
    assert calm["positions"] == (LIMIT - 4) // 16 * 8
    assert (calm["context_tokens"], calm["blocks"]) == (16, 24)
    difference = np.array(calm["brier"]) - wanted.mean.sum(axis=0) / calm["positions"]
    assert np.all(np.abs(difference) < 4 * np.sqrt(wanted.variance.sum(axis=0)) / calm["positions"])
    # Of 4 samples a position, hits count 2 / 4 each and collisions 1 / 6; of 2 or 3 samples all would be thirds.
    sums = np.array(calm["brier"]) * calm["positions"]
    assert 6 * sums == pytest.approx(np.round(6 * sums), abs=1e-3)
    assert np.abs(3 * sums - np.round(3 * sums)).max() > 0.4
    assert calm["brierlm"] == pytest.approx(100 * math.prod(max(0.0, one) for one in calm["brier"]) ** 0.25)


@pytest.mark.parametrize("steps", [{10: 4, 200: 2, 1000: 1}, {10: 1, 200: 4, 1000: 2}])
def test_correlate_brierlm(params: Params, steps: dict[int, int]) -> None:
    """Checkpoints that choose between 4, 2 and 1 next tokens, in either order."""
    for step, choices in steps.items():
        save(bigram_transformer(walk(SIZE, choices)), Path(f"models/transformer_checkpoints/step-{step:07d}"))
    correlate_brierlm.main(params)
    found = json.loads(Path("results/correlation.json").read_text())
    assert list(found) == ["pearson", "spearman", "checkpoints"]
    scores, losses = [], []
    for row, (step, choices) in zip(found["checkpoints"], steps.items(), strict=True):
        assert list(row) == ["step", "cross_entropy_nats", "brierlm", "brierlm_ci95"]
        wanted = of_walk(choices, CHECKPOINT_LIMIT)
        scores.append(brierlm(wanted.mean.sum(axis=0) / sum(wanted.positions)))
        losses.append(cross_entropy(choices, CHECKPOINT_LIMIT))
        assert row["step"] == step
        assert row["brierlm"] == pytest.approx(scores[-1], abs=1e-2)
        assert row["cross_entropy_nats"] == pytest.approx(losses[-1], rel=1e-5)
        assert_interval(row["brierlm_ci95"], wanted)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, losses).statistic, abs=1e-4)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, losses).statistic)
