"""Points of a study that never ran: each model's scores follow a power law that the test chooses."""

import numpy as np

from calm_core.study.point import TRANSFORMER, Point, calm

BUDGETS = [1e12 * 2**exponent for exponent in range(8)]

MODELS = (TRANSFORMER, calm(1), calm(2), calm(4), calm(8))


def point(model: str, budget: float, brierlm: float, hidden_size: int = 128, seed: int = 0, **others: float) -> Point:
    """A completed point, whose interval is a fiftieth of the score to both sides."""
    return Point(
        model=model,
        hidden_size=hidden_size,
        budget=budget,
        seed=seed,
        overrides=[f"model={model}", f"width={hidden_size}", f"budget={budget}", f"seed={seed}"],
        parameters=1_000_000,
        training_tokens=int(budget / 1e7),
        training_flops=budget,
        autoencoder_flops=others.get("autoencoder_flops", 0.0),
        inference_flops_per_token=others.get("inference_flops_per_token", 1e6),
        planned_seconds=60.0,
        state="completed",
        seconds=50.0,
        scores={
            "brierlm": brierlm,
            "brierlm_low": 0.98 * brierlm,
            "brierlm_high": 1.02 * brierlm,
            "bits_per_byte": 2.0,
        },
    )


def points(laws: dict[str, tuple[float, float]], noise: float = 0.01, **others: float) -> list[Point]:
    """One point a model and budget: (score at 1e13 FLOPs, exponent), with log-normal ``noise``."""
    generator = np.random.default_rng(0)
    return [
        point(
            model, budget, score * (budget / 1e13) ** exponent * np.exp(noise * generator.standard_normal()), **others
        )
        for model, (score, exponent) in laws.items()
        for budget in BUDGETS
    ]
