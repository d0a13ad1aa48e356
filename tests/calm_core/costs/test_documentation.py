"""The table of docs/method.md holds what is counted."""

import re
from typing import Any

import pytest

from calm_core.costs.run_shapes import run_shapes
from calm_core.params import Params, load_params
from calm_core.presets import load_preset, sections_beside
from tests import ROOT

TABLE = re.compile(r"^\| (.*) \| ([\d.]+) % \| ([\d.]+) % \|$", re.MULTILINE)


def variant(params: Params, **changes: Any) -> Params:
    return params.model_copy(update={"calm": params.calm.model_copy(update=changes)})


def counted(params: Params, model: str) -> str:
    """Torch's count of a training as a percentage of the paper's."""
    shapes = run_shapes(params)
    ratio = getattr(shapes.counted_flops(), model).training_per_token
    return f"{100 * ratio / getattr(shapes.analytic_flops(), model).training_per_token:.1f}"


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("token head", {"head": "tokens", "input": "tokens"}),
    ("energy head, input by tokens", {"head": "energy", "input": "tokens", "decoder_score": False}),
    (
        "decoder score, as `paper-objective` has it",
        {"head": "energy", "input": "tokens", "decoder_score": True},
    ),
    ("energy head, input by latents", {"head": "energy", "input": "latents", "decoder_score": False}),
    ("decoder score", {"head": "energy", "input": "latents", "decoder_score": True}),
    ("diffusion head, input by tokens", {"head": "diffusion", "input": "tokens"}),
    ("diffusion head, input by latents", {"head": "diffusion", "input": "latents"}),
    ("flow head, input by tokens", {"head": "flow", "input": "tokens"}),
    ("flow head, input by latents", {"head": "flow", "input": "latents"}),
]


@pytest.mark.slow
def test_what_torch_counts_of_what_the_paper_charges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    published = load_preset("calm-m").model_copy(update={"transformer": load_preset("transformer-s").transformer})
    section = (ROOT / "docs/method.md").read_text(encoding="utf-8").split("\n## FLOPs")[1].split("\n## ")[0]
    here = load_params()
    assert counted(here, "calm") == "100.0"  # a token head of another width than that of the table
    beside = here.model_copy(update={"calm": sections_beside(here)["paper-objective"]})
    (others, *shares), *rows = TABLE.findall(section)
    assert others == "autoencoder; Transformer"
    for (title, changes), (written, *found) in zip(VARIANTS, rows, strict=True):
        assert written.endswith(title)
        assert [counted(variant(params, **changes), "calm") for params in (beside, published)] == found
    for model in ("autoencoder", "transformer"):
        assert [counted(params, model) for params in (here, published)] == shares
