"""Each of the three trainings is ``train`` of its objective, under its section of the params and its run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from calm_core.autoencoder.training import train_autoencoder
from calm_core.calm.training import train_calm
from calm_core.params import Params
from calm_core.training.loop import train
from calm_core.training.run import Run
from calm_core.transformer.training import train_transformer
from tests.calm_core.training.tiny_trainings import (
    BUILDS,
    VOCABULARY,
    autoencoder_section,
    calm_section,
    encoded,
    random_tokens,
    stream_of,
    tiny_autoencoder,
    transformer_section,
)


def autoencoder(params: Params, folder: Path, run: Run) -> nn.Module:
    return train_autoencoder(params, stream_of(folder, random_tokens(90)), VOCABULARY, run)


def transformer(params: Params, folder: Path, run: Run) -> nn.Module:
    return train_transformer(params, stream_of(folder, random_tokens(90)), VOCABULARY, run)


def calm(params: Params, folder: Path, run: Run) -> nn.Module:
    of_patches, tokens = tiny_autoencoder(2), stream_of(folder, random_tokens(90))
    return train_calm(params, tokens, encoded(folder, tokens, of_patches), of_patches, run)


@pytest.mark.parametrize("training", [autoencoder, transformer, calm])
def test_a_training_of_params(
    training: Callable[[Params, Path, Run], nn.Module], params: Params, tmp_path: Path
) -> None:
    name = training.__name__
    changed = params.model_copy(
        update={
            "seed": 7,
            "autoencoder": autoencoder_section(params, steps=2),
            "calm": calm_section(params, steps=2),
            "transformer": transformer_section(params, steps=2),
            "runtime": params.runtime.model_copy(update={"gradient_accumulation": 2, "precision": "float32"}),
        }
    )
    folders = tmp_path / "found", tmp_path / "expected"
    for folder in folders:
        folder.mkdir()
    kept = []
    run = Run(keep=lambda done, model: kept.append(done), kept_after=frozenset({1}))
    found = training(changed, folders[0], run)
    assert kept == [1]
    objective = BUILDS[name](changed, folders[1], 7)
    expected = train(objective, getattr(changed, name), changed.runtime)
    for weight, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other)
