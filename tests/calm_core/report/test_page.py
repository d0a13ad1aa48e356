import re
from pathlib import Path
from typing import Any

import polars as pl

from calm_core.params import Params
from calm_core.report.page import read_curves, render_report


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
    of_calm = {
        **run,
        "steps": 280,
        "training_flops": 1.28e12,
        "training_flops_with_autoencoder": 1.76e12,
        "training_tokens": 8.1e6,
    }
    of_transformer = {
        **run,
        "steps": 1445,
        "training_flops_over_calm_with_autoencoder": 0.9997,
        "counted_training_flops_over_calm_with_autoencoder": 1.0384,
    }
    score = {
        "brierlm": 1.5,
        "brierlm_ci95": [1.2, 1.8],
        "brier": [0.1, 0.02, 0.01, 0.001],
        "positions": 10,
        "documents": 3,
        "split": "validation",
        "context_tokens": 256,
        "stride_tokens": 256,
        "blocks": 7,
        "seeds": [0, 1],
        "brierlm_of_seeds": [1.4, 1.6],
    }
    checkpoints = [
        {"step": 10 * n, "cross_entropy_nats": 5.0 - n, "brierlm": 0.5 * n, "brierlm_ci95": [0.4 * n, 0.6 * n]}
        for n in (1, 2, 3)
    ]
    seen = {
        "ngram_tokens": 8,
        "ngram_share_before": 0.187,
        "ngram_share_after": 0.081,
        "document_share_before": 0.113,
        "document_share_after": 0.0,
        "documents_dropped": 724,
    }
    held_out = {"tokens": 678, "documents": 5708, "seen_in_training": seen}
    return dict(  # noqa: C408 - the names are those of arguments
        params=params,
        params_text="seed: 0 # <b>not bold</b>",
        corpus={"source": "<script>alert(1)</script>", "licence": "MIT", "splits": {
            "train": {"tokens": 12345}, "validation": held_out, "test": held_out}},
        autoencoder={"token_accuracy": 0.9995, "token_accuracy_noisy": 0.9991, "posterior_std": 0.14},
        brierlm={
            "calm": score,
            "transformer": {**score, "brierlm": 2.5, "cross_entropy_nats": 3.5},
            "calm_minus_transformer": {"difference": -1.0, "difference_ci95": [-1.4, 0.6], "p": 0.034},
        },
        flops={
            "published": {"transformer_s": model, "calm_m": model, "training_saving": 0.435, "inference_saving": 0.34},
            "run": {"calm": of_calm, "transformer": of_transformer, "autoencoder": run},
        },
        correlation={"pearson": -0.9, "spearman": None, "checkpoints": checkpoints},
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
        "<td>5,708</td><td>724</td><td>18.7 %</td><td>8.1 %</td><td>11.3 %</td><td>0.0 %</td>",
        "Split by service",
        "such documents were dropped",
        "-1.00, 95 % interval",
        "[-1.40, +0.60]",
        "p 0.034",
        "7 blocks of 256 tokens",
        "which came to 1,445 steps",
        "CALM 1.28e+12",
        "both 1.76e+12",
        "1.000 times both",
        "1.038 times both",
        "2.7 times the Transformer's tokens in 280 steps",
        "74.2 %",
        "some processor",
        "abc",
        "Pearson -0.900",
        "Spearman undefined",
        "3 checkpoints",
    ):
        assert text in page
    assert "a &amp; b &lt;i&gt;" in page
    assert "&lt;b&gt;not bold&lt;/b&gt;" in page
    assert "alert(1)</script>" not in page


def test_a_number_of_steps_is_not_called_a_match(params: Params) -> None:
    transformer = params.transformer.model_copy(update={"steps": 1445})
    page = render(params.model_copy(update={"transformer": transformer}))
    assert "number of steps that params.yaml names, 1,445 steps" in page
    assert "which came to" not in page


def test_the_page_needs_nothing_else_and_is_reproducible(params: Params) -> None:
    page = render(params)
    assert page == render(params)
    assert page.count("<svg") == 3
    links = re.findall(r"(?:src|href)=\"([^\"#]+)\"", page)
    assert links == ["timings.js"]  # optional: speeds of the machine, no part of the result


def test_curves_are_read_as_dvclive_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "calm/plots/metrics"
    folder.mkdir(parents=True)
    (folder / "loss.tsv").write_text("step\tloss\n1\t0.5\n2\t0.25\n")
    assert read_curves(tmp_path)["calm"]["loss"].rows() == [(1, 0.5), (2, 0.25)]
