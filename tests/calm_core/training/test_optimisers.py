"""Muon and AdamW against torch's own, which parameter each of them has, and the learning-rate schedules."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calm_core.params import Params, TrainingParams
from calm_core.training.optimisers import (
    Muon,
    build_optimisers,
    learning_rate_factor,
    orthogonalise,
    set_learning_rates,
)
from tests.calm_core.training.tiny_trainings import (
    BUILDS,
    autoencoder_section,
    calm_section,
    keep_float32_in_muon,
    seeded,
    transformer_section,
)

SHAPES = [(7, 3), (3, 7), (5, 5)]
"""Tall, wide, square."""


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)])
def test_orthogonalise_keeps_directions_and_evens_out_strengths(shape: tuple[int, int]) -> None:
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    strengths = torch.linalg.svdvals(result)
    assert strengths.min() > 0.3
    assert strengths.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right
    cosine = (result * nearest).sum(dim=(1, 2)) / result.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))
    assert cosine.min() > 0.95


def test_muon_steps_have_the_same_size_for_any_gradient() -> None:
    parameters = [nn.Parameter(torch.zeros(6, 3)) for _ in range(2)]
    direction = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for parameter, scale in zip(parameters, (1e-3, 1e3), strict=True):
        parameter.grad = scale * direction
    Muon(parameters, lr=0.1).step()
    torch.testing.assert_close(parameters[0], parameters[1], atol=1e-4, rtol=1e-3)
    assert torch.linalg.svdvals(parameters[0].detach()).max() < 1.3 * 0.1 * math.sqrt(2)


@pytest.fixture()
def float32_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float32_in_muon(monkeypatch)


def gradients(like: list[nn.Parameter], steps: int) -> Iterator[list[Tensor]]:
    """Of changing size and direction."""
    generator = seeded(1)
    for step in range(steps):
        yield [(1 + step) * torch.randn(parameter.shape, generator=generator) for parameter in like]


@pytest.mark.usefixtures("float32_muon")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_is_that_of_torch(weight_decay: float, threads: int) -> None:
    start = [torch.randn(shape, generator=seeded(seed)) for seed in range(3) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(weights.clone()) for weights in start] for _ in range(2))
    own = Muon(ours, lr=0.1, weight_decay=weight_decay, threads=threads)
    # Momentum 0.95 with Nesterov's, step size sqrt(max(1, rows / columns)): torch's defaults, named.
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=weight_decay, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )
    for step, now in enumerate(gradients(ours, 6)):
        for optimiser in (own, reference):
            optimiser.param_groups[0]["lr"] = 0.1 / (1 + step)
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, now, strict=True):
                parameter.grad = gradient.clone()
        own.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(a, b, atol=0.05) for a, b in zip(ours, start, strict=True))


def test_muon_decays_nothing_unless_asked_to() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.zeros(3, 2)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(3, 2))


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    moved, left = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    moved.grad = torch.eye(3)
    Muon([left, moved], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(left, torch.ones(3, 3))
    assert not torch.equal(moved, torch.ones(3, 3))


EMBEDDINGS = {
    "autoencoder": {"encoder.embedding.weight"},
    "transformer": {"embedding.weight"},
    "calm": {"patch_embedding.embedding.weight"},
    "calm of latents": set(),
    "calm of tokens": {"patch_embedding.embedding.weight", "head.embedding.weight"},
}
OUTPUTS = ("output.weight", "head.unembedding.weight")


def kind_of(name: str, model: str) -> str:
    """How a weight of a model is trained, by its name: as an embedding, a vector, an output matrix or another one."""
    if name in EMBEDDINGS[model]:
        return "embedding"
    *owners, weight = name.split(".")
    is_norm = "norm" in owners[-1] or ".".join(owners).endswith("patch_embedding.projection.3")
    if weight == "bias" or is_norm:
        return "vector"
    return "output" if name in OUTPUTS else "matrix"


RATES = {"learning_rate": 0.003, "embedding_learning_rate": 0.05, "muon_learning_rate": 0.02, "weight_decay": 0.1}


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("model", BUILDS)
def test_every_weight_of_every_model_has_its_settings(
    model: str, optimiser: str, params: Params, tmp_path: Path
) -> None:
    objective = BUILDS[model](params, tmp_path, 0)
    optimisers = build_optimisers(objective.model, params.calm.model_copy(update={**RATES, "optimiser": optimiser}))
    names = {id(weight): name for name, weight in objective.model.named_parameters()}
    found: dict[str, tuple[Any, ...]] = {}
    for each in optimisers:
        for group in each.param_groups:
            betas, momentum = group.get("betas"), group.get("momentum")
            for weight in group["params"]:
                assert names[id(weight)] not in found
                settings = (type(each), group["initial_lr"], group["lr"], group["weight_decay"], betas, momentum)
                found[names[id(weight)]] = settings
    betas = (0.9, 0.95)
    adamw = torch.optim.AdamW
    expected: dict[str, tuple[Any, ...]] = {
        "embedding": (adamw, 0.05, 0.05, 0.1, betas, None),
        "vector": (adamw, 0.003, 0.003, 0.0, betas, None),
        "output": (adamw, 0.003, 0.003, 0.1, betas, None),
        "matrix": (adamw, 0.003, 0.003, 0.1, betas, None)
        if optimiser == "adamw"
        else (Muon, 0.02, 0.02, 0.1, None, 0.95),
    }
    assert found == {name: expected[kind_of(name, model)] for name in names.values()}
    counts = Counter(kind_of(name, model) for name in names.values())
    assert counts["matrix"] >= 7
    assert counts["vector"] + counts["output"] >= 3
    assert counts["output"] == (model in ("transformer", "calm of tokens"))


@pytest.mark.usefixtures("float32_muon")
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("model", BUILDS)
def test_steps_are_those_of_torch(model: str, optimiser: str, params: Params, tmp_path: Path) -> None:
    ours, theirs = (BUILDS[model](params, tmp_path, 0).model for _ in range(2))
    weights = dict(theirs.named_parameters())
    of_kind = {
        kind: [weight for name, weight in weights.items() if kind_of(name, model) == kind]
        for kind in ("embedding", "vector", "output", "matrix")
    }
    rest: list[dict[str, Any]] = [
        {"params": of_kind["embedding"], "lr": 0.05},
        {"params": of_kind["vector"], "weight_decay": 0.0},
        {"params": of_kind["output"]},
    ]
    if optimiser == "adamw":
        matrices: torch.optim.Optimizer = torch.optim.AdamW(
            of_kind["matrix"], 0.003, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
        )
    else:
        matrices = torch.optim.Muon(of_kind["matrix"], 0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, 0.003, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    by_hand = [adamw, matrices]
    built = build_optimisers(ours, params.calm.model_copy(update={**RATES, "optimiser": optimiser}))
    for now in gradients(list(ours.parameters()), 4):
        for parameters, optimisers in ((ours.parameters(), built), (theirs.parameters(), by_hand)):
            for parameter, gradient in zip(parameters, now, strict=True):
                parameter.grad = gradient.clone()
            for each in optimisers:
                each.step()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight, weights[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_schedules(params: Params) -> None:
    def factors(**changes: Any) -> list[float]:
        section = params.calm.model_copy(update={"steps": 110, "warmup_steps": 10, **changes})
        return [learning_rate_factor(step, section) for step in range(110)]

    constant, linear, cosine = (factors(schedule=name) for name in ("constant", "linear", "cosine"))
    for values in (constant, linear, cosine):
        assert values[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
        assert min(values) > 0
    assert constant[10:] == [1.0] * 100
    assert linear[10:] == pytest.approx([1 - step / 100 for step in range(100)])
    assert cosine[10:] == pytest.approx([(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)])
    assert factors(schedule="linear", warmup_steps=0)[:2] == pytest.approx([1, 109 / 110])


def test_every_group_follows_the_schedule(params: Params) -> None:
    sections: list[TrainingParams] = [autoencoder_section(params), calm_section(params), transformer_section(params)]
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "hidden": nn.Linear(2, 2)})
    for section in sections:
        changes = {**RATES, "optimiser": "muon", "steps": 10, "warmup_steps": 4, "schedule": "linear"}
        section = section.model_copy(update=changes)
        optimisers = build_optimisers(model, section)
        for step, factor in ((0, 0.25), (3, 1.0), (7, 0.5), (1, 0.5)):
            set_learning_rates(optimisers, step, section)
            rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
            assert rates == pytest.approx([factor * rate for rate in (0.02, 0.05, 0.003)])
