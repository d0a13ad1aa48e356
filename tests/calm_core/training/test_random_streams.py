"""Which stream each random number of a training comes from: what is trained depends on their names to the byte."""

from pathlib import Path

import pytest
import torch

from calm_core.autoencoder.model import draw
from calm_core.autoencoder.training import DRAWN_TOGETHER, AutoencoderObjective
from calm_core.calm.training import CalmObjective, head_objective, manifold_distance
from calm_core.params import Params
from calm_core.runtime.randomness import StepStreams, generator
from calm_core.training.batches import batch_indices
from calm_core.transformer.training import TransformerObjective
from tests.calm_core.training.tiny_trainings import (
    BUILDS,
    CONTEXT,
    build_autoencoder,
    build_calm,
    build_transformer,
    calm_section,
    random_tokens,
    tiny_autoencoder,
)

SEED, STEP = 5, 3
BLOCKS = 11
"""Of a context, with what follows, in the 90 tokens of the tiny trainings."""


@pytest.mark.parametrize("model", list(BUILDS))
def test_fresh_weights(model: str, params: Params, tmp_path: Path) -> None:
    found = BUILDS[model](params, tmp_path, SEED).model
    expected = type(found)(found.config)
    expected.initialise(generator(SEED, f"train_{model.split()[0]}", "weights"))
    for weight, of_stage in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, of_stage)


def test_patches_and_noise_of_the_autoencoder(params: Params, tmp_path: Path) -> None:
    objective = build_autoencoder(params, tmp_path, SEED)
    assert isinstance(objective, AutoencoderObjective)
    found = objective.batch(STEP, range(6))
    starts = torch.randint(89, (6,), generator=generator(SEED, "train_autoencoder", "step", STEP))
    assert torch.equal(found.token_ids, random_tokens(90)[starts[:, None] + torch.arange(2)])
    drawn = draw(objective.model.config, DRAWN_TOGETHER, StepStreams(SEED, "train_autoencoder", STEP, range(1)))
    for values, together in zip(found.draws, drawn, strict=True):
        assert torch.equal(values, together[:6])


def test_sequences_of_the_transformer(params: Params, tmp_path: Path) -> None:
    objective = build_transformer(params, tmp_path, SEED)
    assert isinstance(objective, TransformerObjective)
    starts = batch_indices(STEP, 4, BLOCKS, SEED, "train_transformer") * CONTEXT
    expected = random_tokens(90)[starts[:, None] + torch.arange(CONTEXT + 1)]
    assert torch.equal(objective.batch(STEP, range(4)), expected)


def test_sequences_and_noise_of_calm(params: Params, tmp_path: Path) -> None:
    objective = build_calm(params, tmp_path, SEED)
    assert isinstance(objective, CalmObjective)
    found = objective.batch(STEP, range(4))
    starts = batch_indices(STEP, 4, BLOCKS, SEED, "train_calm") * CONTEXT
    assert torch.equal(found.inputs.flatten(1), random_tokens(90)[starts[:, None] + torch.arange(CONTEXT)])
    head, autoencoder = objective.model.head, tiny_autoencoder(2)
    streams = StepStreams(SEED, "train_calm", STEP, range(4))
    expected = head.training_draws(CONTEXT // 2, head_objective(calm_section(params), autoencoder), streams)
    for values, of_stage in zip(found.draws, expected, strict=True):
        assert torch.equal(values, of_stage)
    features = torch.randn(7, objective.model.config.backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    samples = head.sample(features, head.sampling_draws((7,), generator(SEED, "train_calm", "observed")))
    distance = manifold_distance(autoencoder, samples).mean().item()
    assert objective.observe(features) == {"manifold_distance": pytest.approx(distance)}
