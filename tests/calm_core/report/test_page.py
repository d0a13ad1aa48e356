import re
from pathlib import Path
from typing import Any
from unittest import mock

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
        "groups": 2,
        "split": "validation",
        "context_tokens": 256,
        "stride_tokens": 256,
        "blocks": 7,
        "seeds": [0, 1],
        "brierlm_of_seeds": [1.4, 1.6],
        "by_position": [
            {"tokens_before": [1, 32], "brierlm": 1.125, "brierlm_ci95": [1.0, 1.25], "brier": [0.5]},
            {"tokens_before": [33, 64], "brierlm": 1.75, "brierlm_ci95": [1.5, 2.0], "brier": [0.0625]},
        ],
        "by_context": [
            {"context_tokens": 64, "brierlm": 0.875, "brierlm_ci95": [0.75, 1.0], "brier": [0.25], "positions": 4321},
            {"context_tokens": 256, "brierlm": 1.5, "brierlm_ci95": [1.2, 1.8], "brier": [0.1], "positions": 10},
        ],
    }
    likelihood = {
        "nats_per_token": 2.75,
        "nats_per_token_ci95": [2.5, 3.125],
        "bits_per_byte": 1.444,
        "bits_per_byte_ci95": [1.3, 1.6],
        "likelihood_tokens": 7777,
        "likelihood_bytes": 33333,
    }
    bounds = {
        "decoder_temperature": [2.0, 4.0],
        "likelihood_bound": [
            {"samples": samples, "decoder_temperature": tau, "nats_per_token": 16.5 + tau / samples}
            for tau in (1.0, 4.0)
            for samples in (1, 16)
        ],
    }
    correlations = [
        {
            name: {
                "pearson": pearson,
                "spearman": None,
                "samples": 16,
                "decoder_temperature": 4.0,
                "checkpoints": [
                    {
                        "step": 10 * n,
                        measure: 5.0 - n,
                        "brierlm": 0.5 * n + lag,
                        "brier_1": n,
                        "brierlm_ci95": [0.4 * n, 0.6 * n],
                    }
                    for n in (1, 2, 3)
                ],
            }
            for name, measure in (("calm", "nats_per_token"), ("transformer", "cross_entropy_nats"))
        }
        for pearson, lag in ((-0.9, 0.0), (-0.8, 0.25))
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
            "calm": {**score, **likelihood, **bounds},
            "transformer": {
                **score, **likelihood, "brierlm": 2.5, "cross_entropy_nats": 3.5, "bits_per_byte": 1.0625,
                "by_position": [{"tokens_before": [1, 64], "brierlm": 2.25, "brierlm_ci95": [2.0, 2.5], "brier": [1]}],
            },
            "calm_minus_transformer": {"difference": -1.0, "difference_ci95": [-1.4, 0.6], "p": 0.034},
            "beside": {},
        },
        flops={
            "published": {"transformer_s": model, "calm_m": model, "training_saving": 0.435, "inference_saving": 0.34},
            "run": {"calm": of_calm, "transformer": of_transformer, "autoencoder": run, "beside": {}},
        },
        correlations=correlations,
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
    """Of a CALM whose likelihood has bounds alone."""
    params = params.model_copy(update={"calm": params.calm.model_copy(update={"head": "energy"})})
    return render_report(**report_arguments(params))


def test_a_model_that_went_on_from_another_is_told(params: Params) -> None:
    assert "not trained from the beginning" not in render(params)
    calm = params.calm.model_copy(update={"head": "energy", "initial": "<imported>"})
    went_on = params.model_copy(update={"calm": calm})
    arguments = report_arguments(went_on)
    arguments["curves"]["autoencoder"] = {}
    page = render_report(**arguments)
    told = (
        "CALM was not trained from the beginning: it went on from &lt;imported&gt;, with its autoencoder as that was."
    )
    assert page.count("not trained from the beginning") == page.count(told) == 1
    for text in (
        "whose autoencoder was not trained; the Transformer",
        "compute of CALM, which came to",
        "1.000 times CALM",
    ):
        assert text in page
    assert "both" not in page[page.index("<h2>FLOPs</h2>") : page.index("<h2>Sample text</h2>")]


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
        "<td>33 to 64</td><td>1.75</td><td>[1.50, 2.00]</td><td>0.0625</td><td></td><td></td><td></td>",
        "<td>1 to 64</td><td></td><td></td><td></td><td>2.25</td><td>[2.00, 2.50]</td>",
        "<td>64</td><td>0.88</td><td>[0.75, 1.00]</td><td>0.2500</td><td>4,321</td>",
        "<td>CALM, N 16</td><td>16.562</td><td>16.750</td>",
        "<td>Transformer, exact</td><td>2.750</td>",
        "CALM at most 1.444, with tau 2, 4, chosen on the validation split for each seed (bits are a mean over seeds)",
        "the Transformer 1.062",
        "CALM [2.500, 3.125]",
        "7,777 tokens, 33,333 bytes",
        "along 2 trainings",
        "<td>-1.000</td><td>-1.000</td>",  # of Brier-1
        "<td>-0.900, -0.800</td>",
        "<td>undefined, undefined</td>",
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


def with_models_beside(params: Params) -> dict[str, Any]:
    """Arguments of a report with two models beside the run's own, of which one has no intervals."""
    arguments = report_arguments(params)
    brierlm, run = arguments["brierlm"], arguments["flops"]["run"]
    run["beside"] = {
        "first": {**run["calm"], "training_flops_with_autoencoder": 3.5e12, "inference_flops_per_token": 2.25e6},
        "<b>": {**run["calm"], "training_flops_with_autoencoder": 7.5e11},
    }
    brierlm["beside"] = {
        "first": {
            **brierlm["calm"],
            "brierlm": 1.25,
            "brierlm_ci95": [1.125, 1.375],
            "brierlm_of_seeds": [1.24, 1.26],
            "brier": [0.25, 0.125, 0.0625, 0.03125],
            "bits_per_byte": 1.875,
            "minus_transformer": {"difference": 0.375, "difference_ci95": [-0.5, 1.25], "p": 0.0625},
        },
        "<b>": {
            **brierlm["calm"],
            "brierlm": 0.5,
            "brierlm_ci95": None,
            "minus_transformer": {"difference": -2.0, "difference_ci95": None, "p": None},
        },
    }
    return arguments


def test_models_beside_the_runs_own_stand_in_its_comparison(params: Params) -> None:
    page = render_report(**with_models_beside(params))
    for text in (
        "<td>CALM, first</td><td>1.25</td><td>[1.12, 1.38]</td>"
        "<td>0.2500</td><td>0.1250</td><td>0.0625</td><td>0.0312</td><td>10</td><td>see below</td>",
        "<td>CALM, first</td><td>≤ 1.875</td><td>3.50e+12</td><td>2.25e+06</td>"
        "<td>+0.38</td><td>[-0.50, +1.25]</td><td>0.062</td>",
        "<td>CALM</td><td>≤ 1.444</td><td>1.76e+12</td><td>1.00e+06</td>"
        "<td>-1.00</td><td>[-1.40, +0.60]</td><td>0.034</td>",
        "<td>CALM, &lt;b&gt;</td><td>≤ 1.444</td><td>7.50e+11</td><td>1.00e+06</td>"
        "<td>-2.00</td><td>unknown</td><td></td>",
        '<td>Transformer</td><td>1.062</td><td>1.00e+12</td><td>1.00e+06</td><td colspan="3"></td>',
        "BrierLM by seed: CALM 1.40 1.60; CALM, first 1.24 1.26; CALM, &lt;b&gt; 1.40 1.60; Transformer 1.40 1.60.",
        # The labels of the points.
        ">CALM, first  1.25<",
        ">CALM, &lt;b&gt;  0.50<",
        ">CALM  1.50<",
        "<td>CALM, first</td><td>0.00 M</td><td>1.28e+12</td>",
    ):
        assert text in page, text
    models = re.findall(r"<tr><td>(CALM[^<]*|Transformer)</td>", page)
    assert models[:4] == models[4:8] == ["CALM", "CALM, first", "CALM, &lt;b&gt;", "Transformer"]


def test_a_run_alone_is_compared_with_nothing_else(params: Params) -> None:
    page = render(params)
    assert "minus Transformer</th>" not in page
    assert "evaluation.beside" not in page


def test_points_of_models_beside_lie_at_their_compute_and_have_colours_of_their_own(params: Params) -> None:
    arguments = with_models_beside(params)
    with mock.patch("calm_core.report.page.brierlm_against_flops", return_value="") as drawn:
        render_report(**arguments)
    (models,) = drawn.call_args.args
    assert {name: model["training_flops"] for name, model in models.items()} == {
        "CALM": 1.76e12, "Transformer": 1e12, "CALM, first": 3.5e12, "CALM, <b>": 7.5e11
    }  # fmt: skip
    assert len({model["colour"] for model in models.values()}) == 4


def with_token_head(params: Params) -> dict[str, Any]:
    """The same of a CALM that knows its likelihood and has no latents."""
    arguments = report_arguments(params)
    arguments["params"] = params.model_copy(update={"calm": params.calm.model_copy(update={"head": "tokens"})})
    calm = arguments["brierlm"]["calm"]
    del calm["decoder_temperature"], calm["likelihood_bound"]
    calm.update(nats_per_token=2.625, bits_per_byte=1.375)
    for one in arguments["correlations"]:
        del one["calm"]["samples"], one["calm"]["decoder_temperature"]
    arguments["curves"]["calm"] = {"loss": arguments["curves"]["calm"]["loss"]}
    run = arguments["flops"]["run"]
    run["calm"].update(training_flops_with_autoencoder=1.28e12, counted_training_flops=1.28e12)
    return arguments


def test_a_token_head_has_no_bounds_and_no_autoencoder(params: Params) -> None:
    page = render_report(**with_token_head(params))
    for text in (
        "<td>CALM, exact</td><td>2.625</td><td>1.375</td>",
        "<td>Transformer, exact</td><td>2.750</td><td>1.062</td>",
        "1.375; 1.062",
        "CALM [2.500, 3.125]",
        "7,777 tokens, 33,333 bytes",
        "negative log-likelihood, nats a token",
        "CALM's likelihood is exact",
        "training compute of CALM, which came to 1,445 steps",
        "CALM 1.28e+12,\nwhich has no autoencoder; the Transformer",
        "times CALM's. CALM saw",
        "torch counts\n100.0 %.",
        "CALM: cross entropy",
        "draw from it exactly",
        "no use for the autoencoder",
    ):
        assert text in page, text
    for text in ("tau", "bound", "batch approximation", "with its autoencoder", "manifold", "both 1.76", "rebuilds"):
        assert text not in page, text
    assert page.count("<svg") == 5
    assert page == render_report(**with_token_head(params))


def test_a_number_of_steps_is_not_called_a_match(params: Params) -> None:
    transformer = params.transformer.model_copy(update={"steps": 1445})
    page = render(params.model_copy(update={"transformer": transformer}))
    assert "number of steps that params.yaml names, 1,445 steps" in page
    assert "which came to" not in page


def test_the_page_needs_nothing_else_and_is_reproducible(params: Params) -> None:
    page = render(params)
    assert page == render(params)
    assert page.count("<svg") == 6
    links = re.findall(r"(?:src|href)=\"([^\"#]+)\"", page)
    assert links == ["timings.js"]  # optional: speeds of the machine, no part of the result


def test_curves_are_read_as_dvclive_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "calm/plots/metrics"
    folder.mkdir(parents=True)
    (folder / "loss.tsv").write_text("step\tloss\n1\t0.5\n2\t0.25\n")
    assert read_curves(tmp_path)["calm"]["loss"].rows() == [(1, 0.5), (2, 0.25)]
