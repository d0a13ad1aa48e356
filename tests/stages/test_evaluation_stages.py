"""The figures of the stages that evaluate language models, of models in folders whose scores are known exactly."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from tokenizers import Tokenizer, decoders, models

from calm_core.corpus.groups import write_groups
from calm_core.errors import CalmError
from calm_core.params import Params, parse_params
from calm_core.storage.checksum import sha256
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.storage.provenance import DESCRIPTION
from stages import correlate_brierlm, evaluate_brierlm, evaluate_calm, evaluate_transformer, measure_diversity
from stages.runner.places import RUN, Places
from tests import ROOT
from tests.calm_core.known_models import (
    Expected,
    Place,
    Text,
    bigram_calm,
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
TEXT_TO_CHOOSE_ON = chain_text(walk(SIZE, 1), LENGTHS, 0.1, seed=10)
"""Of the validation split: most of it is noise, so that a decoder that is less sure is better."""
LIMIT, CHECKPOINT_LIMIT, LIKELIHOOD_LIMIT = 401, 250, 300
GROUPS = np.arange(len(LENGTHS)) // 4
"""Four documents each."""
LENGTHS_OF_TOKENS = [0, 2, 1, 1]
"""In bytes; the first is the end of texts."""


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"<eos>": 0, "é": 1, "b": 2, "c": 3}, unk_token="b"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<eos>"])
    return made


@pytest.fixture()
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Params of a project in the current folder, which has held-out tokens and no models yet."""
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    tokens = Path("data/tokens")
    tokens.mkdir(parents=True)
    TEXT.write(tokens, "test", SIZE, documents_a_shard=5)
    TEXT_TO_CHOOSE_ON.write(tokens, "validation", SIZE, documents_a_shard=5)
    tokenizer().save(str(tokens / "tokenizer.json"))
    write_json(tokens / DESCRIPTION, {"sha256": {path.name: sha256(path) for path in tokens.iterdir()}})
    write_groups(Path("data/groups.parquet"), dict.fromkeys(("validation", "test"), GROUPS.astype(np.uint64)))
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["runtime"]["threads"] = 1
    values["autoencoder"]["patch_size"] = PATCH_SIZE
    values["calm"]["context_tokens"] = CONTEXT_OF_CALM
    values["transformer"]["context_tokens"] = CONTEXT_OF_TRANSFORMER
    values["evaluation"] |= {
        "seeds": [],
        "beside": [],
        "split": "test",
        "samples": 4,
        "batch_sequences": 3,
        "tokens": LIMIT,
        "checkpoint_tokens": CHECKPOINT_LIMIT,
        "likelihood_tokens": LIKELIHOOD_LIMIT,
        "bootstrap_resamples": 500,
        "temperatures": [1.0, 0.5],
        "diversity_prompts": 160,
    }
    return parse_params(values)


def save(model: Any, folder: Path) -> None:
    save_model(model, None, folder, 8)
    tokenizer().save(str(folder / "tokenizer.json"))


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
    """Near that of a bootstrap over groups by another generator; one over documents or positions lies farther away."""
    every, group = np.unique(GROUPS[wanted.document], return_inverse=True)
    sums, positions = np.zeros((len(every), 4)), np.zeros(len(every))
    np.add.at(sums, group, wanted.mean)
    np.add.at(positions, group, wanted.positions)
    draws = np.random.default_rng(0).integers(len(positions), size=(4000, len(positions)))
    brier = sums[draws].sum(axis=1) / positions[draws].sum(axis=1)[:, None]
    resampled = 100 * np.prod(np.maximum(brier, 0), axis=1) ** 0.25
    middle = brierlm(sums.sum(axis=0) / positions.sum())
    error = resampled.std() * math.sqrt(len(positions) / (len(positions) - 1))
    half_width = scipy.stats.t(positions.sum() ** 2 / (positions**2).sum() - 1).ppf(0.975) * error
    assert interval == pytest.approx([middle - half_width, middle + half_width], rel=0.03)


def test_evaluate_brierlm(params: Params) -> None:
    model, autoencoder = coin_calm(NEXT_PATCHES)
    save(model, Path("models/calm"))
    save(autoencoder, Path("models/calm") / AUTOENCODER)
    save(bigram_transformer(walk(SIZE, 2)), Path("models/transformer"))
    for stage in (evaluate_calm, evaluate_transformer, evaluate_brierlm):
        stage.main(params)
    found = json.loads(Path("results/brierlm.json").read_text())
    assert list(found) == ["calm", "transformer", "calm_minus_transformer", "beside"]
    assert found["beside"] == {}
    difference = found["calm_minus_transformer"]
    assert difference["difference"] == pytest.approx(found["calm"]["brierlm"] - found["transformer"]["brierlm"])
    low, high = difference["difference_ci95"]
    assert low < difference["difference"] < high
    score = ["brierlm", "brierlm_ci95", "brier", "positions", "documents", "groups"]
    by_place = ["by_position", "by_context"]
    likelihood = [f"{measure}{end}" for measure in ("nats_per_token", "bits_per_byte") for end in ("", "_ci95")]
    likelihood += ["likelihood_tokens", "likelihood_bytes"]
    where = ["split", "context_tokens", "stride_tokens", "blocks"]
    bounds = ["decoder_temperature", "likelihood_bound"]
    seeds = ["seeds", "brierlm_of_seeds"]
    assert list(found["calm"]) == [*score, *where, *by_place, *likelihood, *bounds, *seeds]
    assert list(found["transformer"]) == [*score, *where, *by_place, "cross_entropy_nats", *likelihood, *seeds]
    assert found["calm"]["seeds"] == [params.seed]
    assert found["calm"]["decoder_temperature"] == [
        json.loads(Path("results/scores/calm.json").read_text())["decoder_temperature"]
    ]

    wanted, transformer = of_walk(2, LIMIT), found["transformer"]
    assert (transformer["positions"], transformer["documents"]) == (sum(wanted.positions), len(wanted.document))
    assert transformer["groups"] == len(set(GROUPS[wanted.document]))
    assert transformer["positions"] == (LIMIT - 4) // 12 * 6
    assert (transformer["split"], transformer["context_tokens"], transformer["blocks"]) == ("test", 12, 33)
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


def swap_seeds(path: Path, other: Path) -> None:
    """Write the scores at ``path``, of the run's seed and of seed 3, as those of ``other``, in turn."""
    for ending, turned in (("", "-seed-3"), ("-seed-3", "")):
        for suffix in (".json", ".parquet"):
            shutil.copy(f"{path}{ending}{suffix}", f"{other}{turned}{suffix}")


def test_models_beside_are_compared_as_the_runs_own(params: Params) -> None:
    """Under two seeds, of which one knows more: of presets whose scores are those of the run's own models."""
    for there, choices, coins in ((RUN, 2, NEXT_PATCHES), (Places(3), 4, COINS[10])):
        model, autoencoder = coin_calm(coins)
        save(model, there.models / "calm")
        save(autoencoder, there.models / "calm" / AUTOENCODER)
        save(bigram_transformer(walk(SIZE, choices)), there.models / "transformer")
        for stage in (evaluate_calm, evaluate_transformer):
            stage.main(there.params(params), there)
    swap_seeds(Path("results/scores/calm"), Path("results/scores/calm-one"))
    swap_seeds(Path("results/scores/transformer"), Path("results/scores/calm-two"))
    settings = params.evaluation.model_copy(update={"seeds": [3], "beside": ["two", "one"]})
    evaluate_brierlm.main(params.model_copy(update={"evaluation": settings}))
    found = json.loads(Path("results/brierlm.json").read_text())
    assert list(found["beside"]) == ["two", "one"]
    for preset, model in (("one", "calm"), ("two", "transformer")):
        one = dict(found["beside"][preset])
        difference = one.pop("minus_transformer")
        # The mean of seeds knows no order.
        assert one["brierlm_of_seeds"] == found[model]["brierlm_of_seeds"][::-1] != found[model]["brierlm_of_seeds"]
        for key in ("seeds", "brierlm", "brierlm_ci95", "brier", "positions", "bits_per_byte"):
            assert one[key] == pytest.approx(found[model][key])
        assert one.keys() == found[model].keys()
        assert list(difference) == ["difference", "difference_ci95", "p"]
        if model == "calm":
            for key, value in found["calm_minus_transformer"].items():
                assert difference[key] == pytest.approx(value)
        else:
            assert (difference["difference"], difference["p"]) == (pytest.approx(0), pytest.approx(1))
            low, high = difference["difference_ci95"]
            assert low == pytest.approx(-high) != 0
    assert found["calm_minus_transformer"]["difference"] > 1


def test_a_model_beside_of_one_seed_and_one_group_has_no_interval(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    write_groups(Path("data/groups.parquet"), {"test": np.zeros(len(LENGTHS), dtype=np.uint64)})
    save(bigram_transformer(walk(SIZE, 2)), Path("models/transformer"))
    evaluate_transformer.main(params)
    for ending in (".json", ".parquet"):
        for name in ("calm", "calm-one"):
            shutil.copy(f"results/scores/transformer{ending}", f"results/scores/{name}{ending}")
    settings = params.evaluation.model_copy(update={"beside": ["one"]})
    evaluate_brierlm.main(params.model_copy(update={"evaluation": settings}))
    beside = json.loads(Path("results/brierlm.json").read_text())["beside"]["one"]
    assert beside["brierlm_ci95"] is None
    assert beside["minus_transformer"] == {"difference": 0.0, "difference_ci95": None, "p": None}
    told = capsys.readouterr().out
    assert f"calm (one): BrierLM {beside['brierlm']:.2f} over {beside['positions']:,} positions\n" in told
    assert "CALM (one) - Transformer: 0.00, 1 seed\n" in told


def test_the_calm_of_a_preset_is_scored_where_it_was_trained(params: Params) -> None:
    Path("data/beside").mkdir()
    write_json(Path("data/beside/one.json"), {**params.calm.model_dump(), "context_tokens": 12})
    there = Places(3, "one")
    model, autoencoder = coin_calm(NEXT_PATCHES)
    save(model, Path("beside/one/3/models/calm"))
    save(autoencoder, Path("beside/one/3/models/calm") / AUTOENCODER)
    evaluate_calm.main(there.params(params), there)
    assert [path.name for path in sorted(Path("results/scores").iterdir())] == [
        "calm-one-seed-3.json", "calm-one-seed-3.parquet"
    ]  # fmt: skip
    found = json.loads(Path("results/scores/calm-one-seed-3.json").read_text())
    assert (found["context_tokens"], found["blocks"]) == (12, 33)


def scored_bytes(context: int) -> tuple[int, int]:
    """Tokens of the blocks for likelihoods without their first patches, and their bytes."""
    scored = [
        place.following[0]
        for place in places(TEXT, context, 1, LIKELIHOOD_LIMIT)
        if PATCH_SIZE <= len(place.history) < context
    ]
    return len(scored), sum(LENGTHS_OF_TOKENS[token] for token in scored)


def test_likelihoods_in_bits_a_byte(params: Params) -> None:
    table = walk(SIZE, 2)
    save(bigram_transformer(table), Path("models/transformer"))
    evaluate_transformer.main(params)
    found = json.loads(Path("results/scores/transformer.json").read_text())
    tokens, count = scored_bytes(CONTEXT_OF_TRANSFORMER)
    assert (found["likelihood_tokens"], found["likelihood_bytes"]) == (tokens, count)
    asked = [
        place
        for place in places(TEXT, CONTEXT_OF_TRANSFORMER, 1, LIKELIHOOD_LIMIT)
        if PATCH_SIZE <= len(place.history) < CONTEXT_OF_TRANSFORMER
    ]
    nats = [-math.log(table[place.history[-1], place.following[0]]) for place in asked]
    assert found["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / count, rel=1e-4)
    half = half_width_over_groups([place.document for place in asked], nats)
    for measure in ("nats_per_token", "bits_per_byte"):
        low, high = found[f"{measure}_ci95"]
        assert (high - low) / 2 / found[measure] == pytest.approx(half / np.mean(nats), rel=1e-3)
        assert (high + low) / 2 == pytest.approx(found[measure])


def half_width_over_groups(documents: list[int], nats: Sequence[float]) -> float:
    """Of the interval of the mean of ``nats``, a place each, by leaving out each group in turn."""
    group, values = GROUPS[documents], np.array(nats)
    every, counts = np.unique(group, return_counts=True)
    without = np.array([values[group != one].mean() for one in every])
    error = math.sqrt((len(every) - 1) / len(every) * np.sum((without - values.mean()) ** 2))
    return float(scipy.stats.t(counts.sum() ** 2 / np.sum(counts**2) - 1).ppf(0.975) * error)


def of_bound(
    text: Text, limit: int, temperature: float, samples: int, coins: Any = NEXT_PATCHES, drawn: int = 64
) -> tuple[float, float]:
    """Mean over tokens of the bound that ``samples`` tosses give, and its standard error if ``drawn`` are in groups."""
    right = math.exp(math.sqrt(PATCH_SIZE * SIZE + 1) / temperature)
    weights = scipy.stats.binom(samples, 0.5).pmf(np.arange(samples + 1))
    means, variances = [], []
    for place in places(text, CONTEXT_OF_CALM, PATCH_SIZE, limit):
        if len(place.history) == CONTEXT_OF_CALM:
            continue
        heads, tails = (
            math.prod(right if one == other else 1 for one, other in zip(patch, place.following, strict=False))
            / (right + SIZE - 1) ** PATCH_SIZE
            for patch in coins[place.history[-1]]
        )
        values = [-math.log((n * heads + (samples - n) * tails) / samples) for n in range(samples + 1)]
        means.append(np.dot(weights, values))
        variances.append((np.dot(weights, np.square(values)) - means[-1] ** 2) * samples / drawn)
    tokens = PATCH_SIZE * len(means)
    return float(sum(means) / tokens), float(math.sqrt(max(0, sum(variances))) / tokens)


def half_width_of_bound(text: Text, limit: int) -> float:
    """Of ``of_bound`` at temperature 8, if the samples are many: half of them are heads."""
    right, documents, nats = math.exp(math.sqrt(PATCH_SIZE * SIZE + 1) / 8), [], []
    for place in places(text, CONTEXT_OF_CALM, PATCH_SIZE, limit):
        if len(place.history) < CONTEXT_OF_CALM:
            p = np.mean(
                [
                    math.prod(right if one == other else 1 for one, other in zip(patch, place.following, strict=False))
                    for patch in NEXT_PATCHES[place.history[-1]]
                ]
            )
            documents.append(place.document)
            nats.append(-math.log(p / (right + SIZE - 1) ** PATCH_SIZE))
    return half_width_over_groups(documents, nats) / PATCH_SIZE


@pytest.mark.parametrize("split", ["test", "validation"])
def test_bounds_of_the_likelihood_of_a_calm(params: Params, split: str) -> None:
    model, autoencoder = coin_calm(NEXT_PATCHES)
    save(model, Path("models/calm"))
    save(autoencoder, Path("models/calm") / AUTOENCODER)
    settings = params.evaluation.model_copy(update={"split": split})
    evaluate_calm.main(params.model_copy(update={"evaluation": settings}))
    found = json.loads(Path("results/scores/calm.json").read_text())
    text = TEXT if split == "test" else TEXT_TO_CHOOSE_ON
    rows = {(row["decoder_temperature"], row["samples"]): row for row in found["likelihood_bound"]}
    assert list(rows) == [(temperature, samples) for temperature in (1, 2, 4, 8) for samples in (1, 4, 16, 64)]
    for (temperature, samples), row in rows.items():
        wanted, error = of_bound(text, LIKELIHOOD_LIMIT, temperature, samples)
        assert row["nats_per_token"] == pytest.approx(wanted, abs=4 * error + 1e-3)
        low, high = row["nats_per_token_ci95"]
        assert low < row["nats_per_token"] < high
        if (temperature, samples) == (8, 64):  # whose chance is least
            assert (high - low) / 2 == pytest.approx(half_width_of_bound(text, LIKELIHOOD_LIMIT), rel=0.03)
        ratio = found["likelihood_tokens"] / math.log(2) / found["likelihood_bytes"]
        assert row["bits_per_byte"] == pytest.approx(row["nats_per_token"] * ratio)
    if split == "test":
        assert (found["likelihood_tokens"], found["likelihood_bytes"]) == scored_bytes(CONTEXT_OF_CALM)
    # The temperature is that of the validation split, where most tokens are noise, and not the best here.
    here, there = (
        min((1, 2, 4, 8), key=lambda temperature: of_bound(one, limit, temperature, 64)[0])
        for one, limit in ((TEXT, LIKELIHOOD_LIMIT), (TEXT_TO_CHOOSE_ON, LIKELIHOOD_LIMIT // 4))
    )
    assert here < there == found["decoder_temperature"]
    chosen = rows[found["decoder_temperature"], 64]
    assert (found["nats_per_token"], found["bits_per_byte"]) == (chosen["nats_per_token"], chosen["bits_per_byte"])


# Patches that are likelier and likelier to be those of the text, by steps.
COINS = {
    10: [[[3, 3], [2, 0]], [[0, 0], [0, 2]], [[1, 1], [3, 0]], [[1, 2], [1, 3]]],
    200: NEXT_PATCHES,
    1000: [[[1, 2]] * 2, [[2, 3]] * 2, [[3, 0]] * 2, [[0, 1]] * 2],
}


@pytest.mark.parametrize("steps", [{10: 4, 200: 2, 1000: 1}, {10: 1, 200: 4, 1000: 2}])
def test_correlate_brierlm(params: Params, steps: dict[int, int]) -> None:
    """Checkpoints of a Transformer that choose between 4, 2 and 1 next tokens, in either order; and those of a CALM."""
    for step, choices in steps.items():
        save(bigram_transformer(walk(SIZE, choices)), Path(f"models/transformer_checkpoints/step-{step:07d}"))
    for step, coins in COINS.items():
        model, autoencoder = coin_calm(coins)
        save(model, Path(f"models/calm_checkpoints/step-{step:07d}"))
    save(autoencoder, Path("models/calm") / AUTOENCODER)
    Path("results/scores").mkdir()
    write_json(Path("results/scores/calm.json"), {"decoder_temperature": 4.0})
    correlate_brierlm.main(params)
    both = json.loads(Path("results/correlation/run.json").read_text())
    assert list(both) == ["calm", "transformer"]
    found = both["transformer"]
    assert list(found) == ["pearson", "spearman", "brier_1", "checkpoints"]
    scores, losses = [], []
    for row, (step, choices) in zip(found["checkpoints"], steps.items(), strict=True):
        assert list(row) == ["step", "cross_entropy_nats", "brierlm", "brierlm_ci95", "brier_1"]
        wanted = of_walk(choices, CHECKPOINT_LIMIT)
        scores.append(brierlm(wanted.mean.sum(axis=0) / sum(wanted.positions)))
        losses.append(cross_entropy(choices, CHECKPOINT_LIMIT))
        assert row["step"] == step
        assert row["brierlm"] == pytest.approx(scores[-1], abs=1e-2)
        assert row["cross_entropy_nats"] == pytest.approx(losses[-1], rel=1e-5)
        assert_interval(row["brierlm_ci95"], wanted)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, losses).statistic, abs=1e-4)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, losses).statistic)
    assert_correlation_of_calm(both["calm"])


def assert_correlation_of_calm(found: dict[str, Any]) -> None:
    assert (found["samples"], found["decoder_temperature"]) == (16, 4)
    for row, (step, coins) in zip(found["checkpoints"], COINS.items(), strict=True):
        assert list(row) == ["step", "nats_per_token", "brierlm", "brierlm_ci95", "brier_1"]
        assert row["step"] == step
        bound, error = of_bound(TEXT, LIKELIHOOD_LIMIT // 4, 4.0, 16, coins, drawn=16)
        assert row["nats_per_token"] == pytest.approx(bound, abs=4 * error + 1e-3)
        paths = paths_of_patches(coins)
        asked = places(TEXT, CONTEXT_OF_CALM, PATCH_SIZE, CHECKPOINT_LIMIT)
        moments = [moments_of_sampling(paths(place.history), place.following, 6) for place in asked]
        brier = sum(one.mean for one in moments) / len(asked)
        error = np.sqrt(sum(one.variance for one in moments)) / len(asked)
        low, high = (float(100 * np.prod(np.maximum(brier + sign * error, 0)) ** 0.25) for sign in (-4, 4))
        assert low - 1e-3 <= row["brierlm"] <= high + 1e-3
        assert row["brier_1"] == pytest.approx(brier[0], abs=4 * error[0] + 1e-5)
    for key, told in (("brierlm", found), ("brier_1", found["brier_1"])):
        sides = [[row[side] for row in found["checkpoints"]] for side in (key, "nats_per_token")]
        assert told["pearson"] == pytest.approx(scipy.stats.pearsonr(*sides).statistic)
        assert told["spearman"] == pytest.approx(scipy.stats.spearmanr(*sides).statistic)
    assert found["pearson"] < -0.5


def test_a_token_head_has_an_exact_likelihood(params: Params) -> None:
    """Everywhere that of the table it is made of: no bounds, no temperature of a decoder, no autoencoder."""
    save(bigram_calm(walk(SIZE, 2), PATCH_SIZE), Path("models/calm"))
    (Path("models/calm") / AUTOENCODER).mkdir()
    save(bigram_transformer(walk(SIZE, 2)), Path("models/transformer"))
    for stage in (evaluate_calm, evaluate_transformer, evaluate_brierlm):
        stage.main(params)
    found = json.loads(Path("results/brierlm.json").read_text())
    calm, transformer = found["calm"], found["transformer"]
    assert calm.keys() == transformer.keys() - {"cross_entropy_nats"}
    paths = paths_of_bigrams(walk(SIZE, 2))
    asked = places(TEXT, CONTEXT_OF_CALM, PATCH_SIZE, LIMIT)
    wanted = expected(asked, lambda place: moments_of_probabilities(paths(place.history), place.following, 1))
    brier = wanted.mean.sum(axis=0) / sum(wanted.positions)
    assert calm["positions"] == sum(wanted.positions)
    assert calm["brier"] == pytest.approx(brier, abs=1e-5)
    assert_interval(calm["brierlm_ci95"], wanted)
    assert (calm["likelihood_tokens"], calm["likelihood_bytes"]) == scored_bytes(CONTEXT_OF_CALM)
    scored = [
        place
        for place in places(TEXT, CONTEXT_OF_CALM, 1, LIKELIHOOD_LIMIT)
        if PATCH_SIZE <= len(place.history) < CONTEXT_OF_CALM
    ]
    nats = [-math.log(walk(SIZE, 2)[place.history[-1], place.following[0]]) for place in scored]
    assert calm["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert calm["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / calm["likelihood_bytes"], rel=1e-4)
    half = half_width_over_groups([place.document for place in scored], nats)
    low, high = calm["nats_per_token_ci95"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)


def test_correlation_of_a_token_head(params: Params) -> None:
    steps = {10: 4, 200: 2, 1000: 1}
    for step, choices in steps.items():
        save(bigram_calm(walk(SIZE, choices), PATCH_SIZE), Path(f"models/calm_checkpoints/step-{step:07d}"))
        save(bigram_transformer(walk(SIZE, choices)), Path(f"models/transformer_checkpoints/step-{step:07d}"))
    correlate_brierlm.main(params)
    both = json.loads(Path("results/correlation/run.json").read_text())
    found = both["calm"]
    assert list(found) == list(both["transformer"]) == ["pearson", "spearman", "brier_1", "checkpoints"]
    scored = [
        place
        for place in places(TEXT, CONTEXT_OF_CALM, 1, LIKELIHOOD_LIMIT // 4)
        if PATCH_SIZE <= len(place.history) < CONTEXT_OF_CALM
    ]
    for row, (step, choices) in zip(found["checkpoints"], steps.items(), strict=True):
        assert list(row) == ["step", "nats_per_token", "brierlm", "brierlm_ci95", "brier_1"]
        assert row["step"] == step
        table, paths = walk(SIZE, choices), paths_of_bigrams(walk(SIZE, choices))
        nats = [-math.log(table[place.history[-1], place.following[0]]) for place in scored]
        assert row["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-4, abs=1e-6)
        asked = places(TEXT, CONTEXT_OF_CALM, PATCH_SIZE, CHECKPOINT_LIMIT)
        moments = [moments_of_probabilities(paths(place.history), place.following, 1) for place in asked]
        assert row["brier_1"] == pytest.approx(np.mean([one.mean[0] for one in moments]), abs=1e-5)


SUCCESSOR = [1, 2, 3, 0, 0]
"""What the models write after each token, with certainty: never 4, which ends the documents of the text."""


def circular_text(lengths: list[int], seed: int) -> Text:
    """Documents that follow ``SUCCESSOR``, with a wrong token now and then."""
    draws, documents = random.Random(seed), []
    for length in lengths:
        document = [draws.randrange(4)]
        while len(document) < length:
            document.append(SUCCESSOR[document[-1]] if draws.random() < 0.9 else draws.randrange(4))
        documents.append([*document, 4])
    return Text(documents)


def written(last: int, tokens: int) -> list[int]:
    text = [last]
    while len(text) <= tokens:
        text.append(SUCCESSOR[text[-1]])
    return text[1:]


def ngrams(text: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + length]) for start in range(len(text) - length + 1)]


def copied_in(texts: list[list[int]], training: Text) -> float:
    """The share of 8-grams without an end inside that a document of ``training`` has."""
    whole = [one for text in texts for one in ngrams(text, 8) if 4 not in one[:-1]]
    held = {one for document in training.documents for one in ngrams(document, 8)}
    return float(np.mean([one in held for one in whole]))


@pytest.mark.parametrize("head", ["energy", "tokens"])
def test_measure_diversity(params: Params, head: str) -> None:
    """Models that write one text alone, at each temperature: each figure is known exactly."""
    held_out, training = circular_text([60, 30, 3, 90, 45, 12, 80] * 2, 1), circular_text([40, 9, 5], 2)
    tokens = Path("data/tokens")
    for path in tokens.iterdir():
        path.unlink()
    held_out.write(tokens, "test", 5, documents_a_shard=5)
    training.write(tokens, "train", 5, documents_a_shard=2)
    ended_by_4 = Tokenizer(models.WordLevel({"a": 0, "é": 1, "b": 2, "c": 3, "<eos>": 4}, unk_token="b"))
    ended_by_4.save(str(tokens / "tokenizer.json"))
    write_json(tokens / DESCRIPTION, {"sha256": {path.name: sha256(path) for path in tokens.iterdir()}})
    table = np.full((5, 5), math.exp(-20))
    table[range(5), SUCCESSOR] = 1
    save(bigram_transformer(table), Path("models/transformer"))
    if head == "tokens":
        save(bigram_calm(table, PATCH_SIZE), Path("models/calm"))
    else:
        model, autoencoder = coin_calm([[written(last, PATCH_SIZE)] * 2 for last in range(5)])
        save(model, Path("models/calm"))
        save(autoencoder, Path("models/calm") / AUTOENCODER)
    for name in ("calm", "transformer"):
        ended_by_4.save(f"models/{name}/tokenizer.json")
    measure_diversity.main(params)
    found = json.loads(Path("results/diversity.json").read_text())
    counts = ["split", "prompts", "prompt_tokens", "texts", "text_tokens"]
    assert list(found) == [*counts, "truth", "calm", "transformer"]
    # Half of the shorter context, and what is left of it or the length of an 8-gram.
    assert [found[key] for key in counts] == ["test", 160, 6, 20, 8]

    stream = held_out.stream
    there = len(stream) - 6 - 8 + 1
    prompts = [there * number // 160 for number in range(160)]
    truth = [stream[start + 6 : start + 14] for start in prompts]
    texts = [written(stream[start + 5], 8) for start in prompts]
    hits = [[text[:n] == true[:n] for text, true in zip(texts, truth, strict=True)] for n in range(1, 5)]
    accuracy = [float(np.mean(of_length)) for of_length in hits]
    assert accuracy[3] < accuracy[0] < 1
    for name in ("calm", "transformer"):
        assert list(found[name]) == ["1.0", "0.5"]
        for temperature, row in found[name].items():
            assert row["temperature"] == float(temperature)
            assert row["accuracy"] == pytest.approx(accuracy)
            errors = [np.std(of_length, ddof=1) / math.sqrt(160) for of_length in hits]
            assert row["accuracy_standard_error"] == pytest.approx(errors)
            assert row["collision"] == [1, 1, 1, 1]
            assert row["collision_standard_error"] == [0, 0, 0, 0]
            brier = [2 * one - 1 for one in accuracy]
            assert row["brierlm"] == pytest.approx(100 * math.prod(max(0, one) for one in brier) ** 0.25)
            low, high = row["brierlm_ci95"]
            assert low <= row["brierlm"] <= high
            assert row["exact"] == float(name == "transformer" or head == "tokens" or temperature == "1.0")
            assert row["reached"] == 1  # all draws of a patch are alike
            assert_varied(row, texts[::8], training)
    assert_varied(found["truth"], truth[::8], training)
    assert found["truth"]["copied"] < found["calm"]["1.0"]["copied"]
    assert list(found["truth"]) == [
        "distinct", "distinct_standard_error", "copied", "copied_standard_error"
    ]  # fmt: skip
    before = Path("results/diversity.json").read_bytes()
    measure_diversity.main(params)
    assert Path("results/diversity.json").read_bytes() == before


def assert_varied(row: dict[str, Any], texts: list[list[int]], training: Text) -> None:
    for length, share in enumerate(row["distinct"], start=1):
        found = list(itertools.chain(*(ngrams(text, length) for text in texts)))
        assert share == pytest.approx(len(set(found)) / len(found))
    assert row["copied"] == pytest.approx(copied_in(texts, training))
    assert row["copied"] > 0


def test_shares_are_of_steps_and_not_of_places() -> None:
    texts, openings = torch.full((2, 32), 0.25, dtype=torch.float64), torch.full((2, 224), 0.75, dtype=torch.float64)
    found = measure_diversity.share_of_steps(texts, openings, 8, 1)
    assert found == pytest.approx((32 * 8 * 0.25 + 224 * 0.75) / (32 * 8 + 224))


def test_a_split_too_short_for_two_texts(params: Params) -> None:
    model, autoencoder = coin_calm(NEXT_PATCHES)
    save(model, Path("models/calm"))
    save(autoencoder, Path("models/calm") / AUTOENCODER)
    save(bigram_transformer(walk(SIZE, 2)), Path("models/transformer"))
    tokens = Path("data/tokens")
    for path in tokens.glob("*.safetensors"):
        path.unlink()
    Text([[0] * 21]).write(tokens, "test", SIZE, documents_a_shard=1)
    write_json(tokens / DESCRIPTION, {"sha256": {path.name: sha256(path) for path in tokens.glob("*.safetensors")}})
    with pytest.raises(CalmError, match="the test split has 21 tokens, too few for 9 prompts of 6 and 8 more"):
        measure_diversity.main(params)
