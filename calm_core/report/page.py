"""The report: one HTML page that needs nothing else, from the results of a run. All text in it is escaped."""

from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from calm_core.report.diversity_figure import quality_against_diversity
from calm_core.report.figures import (
    CALM,
    TRANSFORMER,
    brierlm_against_cross_entropy,
    brierlm_against_flops,
    training_curves,
)

TITLES = {"calm": "CALM", "transformer": "Transformer"}
_COLOURS = {"calm": CALM, "transformer": TRANSFORMER}


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
    correlation: dict[str, Any],
    diversity: dict[str, Any],
    curves: dict[str, dict[str, pl.DataFrame]],
    samples: list[dict[str, str]],
    machine: dict[str, str],
) -> str:
    """The page as text; arguments are the contents of results/*.json and what the report stage gathers."""
    # Strict: a key that a result lacks stops the report, where the default would leave an empty cell. Autoescape, since
    # sample texts hold anything.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    models = {
        title: {**brierlm[name], "training_flops": flops["run"][name]["training_flops"], "colour": _COLOURS[name]}
        for name, title in TITLES.items()
    }
    figures = {
        "quality": brierlm_against_flops(models),
        "curves": training_curves(curves),
        "correlation": brierlm_against_cross_entropy(correlation["checkpoints"]),
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
        correlation=correlation,
        diversity=diversity,
        figures=figures,
        samples=samples,
        machine=machine,
        titles=TITLES,
        interval=_interval,
        with_error=_with_error,
    )


def _interval(result: dict[str, Any]) -> str:
    low, high = result["brierlm_ci95"]
    return f"[{low:.2f}, {high:.2f}]"


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
    ]
