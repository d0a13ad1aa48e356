import re
from pathlib import Path
from typing import Any

import polars as pl

from calm_core.params import Params
from calm_core.report.page import read_curves, render_report

SHARES = {
    "distinct": [0.3, 0.6, 0.871, 0.9],
    "distinct_standard_error": [0.01] * 4,
    "copied": 0.315,
    "copied_standard_error": 0.022,
}
AT_TEMPERATURE = {
    **SHARES,
    "accuracy": [0.237, 0.1, 0.05, 0.02],
    "accuracy_standard_error": [0.014] * 4,
    "collision": [0.4, 0.3, 0.2, 0.1],
    "collision_standard_error": [0.02] * 4,
    "brierlm": 3.75,
    "brierlm_ci95": [2.25, 4.5],
    "exact": 0.0,
    "reached": 0.25,
}
OVER_TEMPERATURES = {str(at): {**AT_TEMPERATURE, "temperature": at} for at in (1.0, 0.65)}


def report_arguments(params: Params) -> dict[str, Any]:
    """All that a report is made of."""
    table = pl.DataFrame({"step": [1, 2, 3], "value": [3.0, 2.0, 1.5]})
    scalars = ("loss", "cross_entropy", "kl", "fidelity", "diversity", "manifold_distance")
    model = {"parameters": 1000, "training_flops": 1e12, "inference_flops_per_token": 1e6}
    run = {
        **model,
        "measured_inference_flops_per_token": 1.01e6,
        "counted_training_flops": 0.95e12,
        "training_tokens": 3e6,
    }
    of_calm = {**run, "training_flops": 1.28e12, "training_flops_with_autoencoder": 1.76e12, "training_tokens": 8.1e6}
    score = {
        "brierlm": 1.5,
        "brierlm_ci95": [1.2, 1.8],
        "brier": [0.1, 0.02, 0.01, 0.001],
        "positions": 10,
        "documents": 3,
        "split": "validation",
        "context_tokens": 256,
        "blocks": 7,
    }
    checkpoints = [
        {"step": 10 * n, "cross_entropy_nats": 5.0 - n, "brierlm": 0.5 * n, "brierlm_ci95": [0.4 * n, 0.6 * n]}
        for n in (1, 2, 3)
    ]
    return dict(  # noqa: C408 - the names are those of arguments
        params=params,
        params_text="seed: 0 # <b>not bold</b>",
        corpus={"source": "<script>alert(1)</script>", "licence": "MIT", "splits": {
            "train": {"tokens": 12345}, "validation": {"tokens": 678}}},
        autoencoder={"token_accuracy": 0.9995, "token_accuracy_noisy": 0.9991, "posterior_std": 0.14},
        brierlm={
            "calm": score,
            "transformer": {**score, "brierlm": 2.5, "cross_entropy_nats": 3.5},
            "calm_minus_transformer": {"difference": -1.0, "difference_ci95": [-1.4, 0.6], "p": 0.034},
        },
        flops={
            "published": {"transformer_s": model, "calm_m": model, "training_saving": 0.435, "inference_saving": 0.34},
            "run": {"calm": of_calm, "transformer": run, "autoencoder": run},
        },
        correlation={"pearson": -0.9, "spearman": None, "checkpoints": checkpoints},
        diversity={
            "split": "validation",
            "prompts": 123,
            "prompt_tokens": 45,
            "texts": 17,
            "text_tokens": 29,
            "truth": {**SHARES, "copied": None, "copied_standard_error": None},
            "calm": OVER_TEMPERATURES,
            "transformer": OVER_TEMPERATURES,
        },
        curves={name: dict.fromkeys(scalars, table) for name in ("autoencoder", "calm", "transformer")},
        samples=[{"prompt": "a & b <i>", "truth": "t", "calm": "c", "transformer": "d"}],
        machine={"processor": "some processor", "git revision": "abc"},
    )  # fmt: skip


def render(params: Params) -> str:
    return render_report(**report_arguments(params))


def test_everything_is_on_the_page_and_escaped(params: Params) -> None:
    page = render(params)
    for text in (
        "1.50",
        "[1.20, 1.80]",
        "99.95 %",
        "3.500 nats",
        "44 %",
        "34 %",
        "12,345",
        "-1.00, 95 % interval",
        "[-1.40, +0.60]",
        "p 0.034",
        "7 blocks of 256 tokens",
        "1.28 times the Transformer's",
        "1.76 times with its autoencoder's",
        "2.7 times the tokens",
        "74.2 %",
        "some processor",
        "abc",
        "Pearson -0.900",
        "Spearman undefined",
        "3 checkpoints",
        "123 places",
        "45 tokens before it",
        "17 places and",
        "29 tokens each",
        "<td>0.65</td><td>23.7 ± 1.4</td>",
        "<td>40.0 ± 2.0</td><td>3.75</td><td>[2.25, 4.50]</td>",
        "<td>87.1 ± 1.0</td>",
        "<td>31.5 ± 2.2</td><td>25</td>",
        "<td>none there</td>",
    ):
        assert text in page
    assert "a &amp; b &lt;i&gt;" in page
    assert "&lt;b&gt;not bold&lt;/b&gt;" in page
    assert "alert(1)</script>" not in page


def test_the_page_needs_nothing_else_and_is_reproducible(params: Params) -> None:
    page = render(params)
    assert page == render(params)
    assert page.count("<svg") == 4
    links = re.findall(r"(?:src|href)=\"([^\"#]+)\"", page)
    assert links == ["timings.js"]  # optional: speeds of the machine, no part of the result


def test_curves_are_read_as_dvclive_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "calm/plots/metrics"
    folder.mkdir(parents=True)
    (folder / "loss.tsv").write_text("step\tloss\n1\t0.5\n2\t0.25\n")
    assert read_curves(tmp_path)["calm"]["loss"].rows() == [(1, 0.5), (2, 0.25)]
