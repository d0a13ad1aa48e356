"""The report: one HTML page that needs nothing else, from the results of a run. All text in it is escaped."""

from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from calm_core.evaluation.correlation import pooled_correlation
from calm_core.report.diversity_figure import quality_against_diversity
from calm_core.report.figures import (
    CALM,
    FURTHER,
    TRANSFORMER,
    brierlm_against_flops,
    brierlm_against_likelihood,
    brierlm_by_place,
    likelihood_bounds,
    training_curves,
)

TITLES = {"calm": "CALM", "transformer": "Transformer"}
_COLOURS = {"calm": CALM, "transformer": TRANSFORMER}
_CHARGED = {"calm": "training_flops_with_autoencoder", "transformer": "training_flops"}
_MEASURES = {"calm": "nats_per_token", "transformer": "cross_entropy_nats"}
"""What BrierLM is compared with along a training, by its name in a checkpoint."""


def read_curves(folder: Path) -> dict[str, dict[str, pl.DataFrame]]:
    """The training curves under ``folder``: a model's name to its scalars, each a table of step and value."""
    return {
        model.name: {
            path.stem: pl.read_csv(path, separator="\t") for path in sorted((model / "plots/metrics").glob("*.tsv"))
        }
        for model in sorted(folder.iterdir())
    }


def render_report(
    *,
    params: Any,
    params_text: str,
    corpus: dict[str, Any],
    autoencoder: dict[str, Any],
    brierlm: dict[str, Any],
    flops: dict[str, Any],
    correlations: list[dict[str, Any]],
    diversity: dict[str, Any],
    curves: dict[str, dict[str, pl.DataFrame]],
    samples: list[dict[str, str]],
    machine: dict[str, str],
) -> str:
    """The page as text; arguments are the contents of results/*.json and what the report stage gathers.

    ``correlations`` are those of results/correlation, one a seed, the run's own first.
    """
    # Strict: a key that a result lacks stops the report, where the default would leave an empty cell. Autoescape, since
    # sample texts hold anything.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    models = {
        title: {**brierlm[name], "training_flops": flops["run"][name][_CHARGED[name]], "colour": _COLOURS[name]}
        for name, title in TITLES.items()
    }
    beside = _beside(brierlm, flops)
    # None of a CALM with a token head, which has its likelihood itself.
    bounds = _bounds(brierlm["calm"])
    figures = {
        "quality": brierlm_against_flops({**models, **beside}),
        "curves": training_curves(curves),
        "by_place": brierlm_by_place(models),
        "likelihood": likelihood_bounds(bounds, brierlm["transformer"]["nats_per_token"]) if bounds else "",
        "correlation": _correlation_figure(correlations),
        "diversity": quality_against_diversity(
            diversity, {name: (title, _COLOURS[name]) for name, title in TITLES.items()}
        ),
    }
    return environment.get_template("report.html.jinja").render(
        params=params,
        params_text=params_text,
        corpus=corpus,
        autoencoder=autoencoder,
        brierlm=brierlm,
        flops=flops,
        flops_rows=_flops_rows(flops),
        beside=beside,
        scored={TITLES["calm"]: brierlm["calm"], **beside, TITLES["transformer"]: brierlm["transformer"]},
        compared=_compared(brierlm, flops, beside),
        bounds=bounds,
        by_position=_place_rows(models, "by_position", "tokens_before"),
        by_context=_place_rows(models, "by_context", "context_tokens"),
        correlations=_correlation_rows(correlations),
        diversity=diversity,
        figures=figures,
        samples=samples,
        machine=machine,
        titles=TITLES,
        interval=_interval,
        signed_interval=_signed_interval,
        groups=_groups,
        correlated=_figure,
        with_error=_with_error,
    )


def _interval(result: dict[str, Any]) -> str:
    return "[{:.2f}, {:.2f}]".format(*result["brierlm_ci95"]) if result["brierlm_ci95"] else "unknown"


def _signed_interval(difference: dict[str, Any]) -> str:
    interval = difference["difference_ci95"]
    return "[{:+.2f}, {:+.2f}]".format(*interval) if interval else "unknown"


def _beside(brierlm: dict[str, Any], flops: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By title, the CALMs of presets that were trained beside the run's own: their scores, FLOPs and colours."""
    return {
        f"{TITLES['calm']}, {preset}": {**result, **flops["run"]["beside"][preset], "colour": colour}
        | {"training_flops": flops["run"]["beside"][preset][_CHARGED["calm"]]}
        for (preset, result), colour in zip(brierlm["beside"].items(), cycle(FURTHER), strict=False)
    }


def _compared(
    brierlm: dict[str, Any], flops: dict[str, Any], beside: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row a model with what it takes and how much it is above the Transformer."""
    calm, transformer = (
        {"title": title, **brierlm[name], **flops["run"][name], "training_flops": flops["run"][name][_CHARGED[name]]}
        for name, title in TITLES.items()
    )
    calm["minus_transformer"] = brierlm["calm_minus_transformer"]
    return [calm, *({"title": title, **model} for title, model in beside.items()), transformer]


def _groups(result: dict[str, Any]) -> str:
    """What intervals are over: so many held-out documents or, where the splits keep some together, groups of them."""
    documents, groups = result["documents"], result["groups"]
    told = f"{documents:,} held-out documents"
    return told if groups == documents else f"{groups:,} groups of {told}"


def _place_rows(models: dict[str, dict[str, Any]], kind: str, key: str) -> list[dict[str, Any]]:
    """A row for each place of any model, with the score of each model there; None where a model has no such place."""
    by_model = [{_place(row[key]): row for row in model[kind]} for model in models.values()]
    every = dict.fromkeys(place for found in by_model for place in found)
    return [{"place": place, "scores": [found.get(place) for found in by_model]} for place in every]


def _place(place: int | list[int]) -> str:
    return " to ".join(f"{number:,}" for number in place) if isinstance(place, list) else f"{place:,}"


def _bounds(calm: dict[str, Any]) -> dict[float, list[tuple[int, float]]]:
    """By temperature of the decoder's softmax, number of samples and bound in nats a token, where there are any."""
    found: dict[float, list[tuple[int, float]]] = {}
    for row in calm.get("likelihood_bound", []):
        found.setdefault(row["decoder_temperature"], []).append((row["samples"], row["nats_per_token"]))
    return found


def _correlation_figure(correlations: list[dict[str, Any]]) -> str:
    calm = correlations[0]["calm"]
    labels = {
        "calm": f"likelihood bound of {calm['samples']} samples" if "samples" in calm else "negative log-likelihood",
        "transformer": "cross entropy",
    }
    return brierlm_against_likelihood(
        {
            f"{title}: two measures": {
                "colour": _COLOURS[name],
                "measure": _MEASURES[name],
                "label": labels[name],
                "runs": [one[name]["checkpoints"] for one in correlations],
            }
            for name, title in TITLES.items()
        }
    )


def _correlation_rows(correlations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a model: its correlation over all checkpoints together, and of each training."""
    return [
        {
            "title": title,
            "checkpoints": sum(len(one[name]["checkpoints"]) for one in correlations),
            "pooled": {
                score: pooled_correlation([one[name] for one in correlations], score, _MEASURES[name])._asdict()
                for score in ("brierlm", "brier_1")
            },
            "runs": [one[name] for one in correlations],
        }
        for name, title in TITLES.items()
    ]


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _with_error(share: float | None, error: float | None) -> str:
    """A share and its standard error in %."""
    if share is None:
        return "none there"
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _flops_rows(flops: dict[str, Any]) -> list[dict[str, Any]]:
    published, run = flops["published"], flops["run"]
    return [
        {"name": "Transformer-S, published shape", "key": "", "counted": None, **published["transformer_s"]},
        {"name": "CALM-M, published shape", "key": "", "counted": None, **published["calm_m"]},
        *(
            {
                "name": f"{name}, this run",
                "key": key,
                "counted": run[key]["measured_inference_flops_per_token"],
                **run[key],
            }
            for key, name in (*TITLES.items(), ("autoencoder", "Autoencoder"))
        ),
        # Their speed is not measured.
        *(
            {
                "name": f"{TITLES['calm']}, {preset}",
                "key": "",
                "counted": model["measured_inference_flops_per_token"],
                **model,
            }
            for preset, model in run["beside"].items()
        ),
    ]
