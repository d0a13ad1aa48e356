import json

import numpy as np
import pytest
import scipy.stats

from calm_core.evaluation.correlation import Correlation, correlation, pooled_correlation


def pairs() -> dict[str, tuple[list[float], list[float]]]:
    random = np.random.default_rng(0)
    x = random.normal(size=30)
    return {
        "noisy": (x.tolist(), (x + random.normal(size=30)).tolist()),
        "monotone": (x.tolist(), (-np.exp(3 * x)).tolist()),
        "ties": (random.integers(4, size=40).tolist(), random.integers(3, size=40).tolist()),
        "two": ([1.0, 2.0], [5.0, 3.0]),
        "far from zero": ((1e6 + x).tolist(), (x + random.normal(size=30) - 1e6).tolist()),
    }


@pytest.mark.parametrize("name", pairs())
def test_against_scipy(name: str) -> None:
    first, second = pairs()[name]
    found = correlation(first, second)
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(first, second).statistic, abs=1e-7)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-7)


def test_ranks_see_only_the_order() -> None:
    first, second = pairs()["monotone"]
    found = correlation(first, second)
    assert found.spearman == pytest.approx(-1)
    assert found.pearson is not None
    assert -0.95 < found.pearson < 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.7, 1e6])
@pytest.mark.parametrize("length", [2, 3, 10])
def test_a_side_that_never_varies_has_no_correlation(constant: float, length: int) -> None:
    varying, still = [float(n * n) for n in range(length)], [constant] * length
    for sides in ((varying, still), (still, varying), (still, still)):
        assert correlation(*sides) == Correlation(None, None)


def test_the_result_is_json() -> None:
    assert json.dumps(correlation([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])._asdict()) == '{"pearson": null, "spearman": null}'


def test_runs_are_pooled_by_their_checkpoints() -> None:
    # Each run falls in a line, one above the other, so that together they lie in none.
    runs = [
        {"checkpoints": [{"brierlm": step + above, "nats": 9.0 - step} for step in range(length)]}
        for above, length in ((0.0, 4), (5.0, 3))
    ]
    scores = [0, 1, 2, 3, 5, 6, 7]
    nats = [9, 8, 7, 6, 9, 8, 7]
    found = pooled_correlation(runs, "brierlm", "nats")
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(scores, nats).statistic)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(scores, nats).statistic)
