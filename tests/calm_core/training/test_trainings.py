"""Each of the three trainings hands its models to its run, as the section ``runtime`` has them trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from calm_core.autoencoder.training import train_autoencoder
from calm_core.calm.training import train_calm
from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.training.run import Run
from calm_core.transformer.training import train_transformer
from tests.calm_core.training.tiny_trainings import (
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
def test_a_training_and_its_run(
    training: Callable[[Params, Path, Run], nn.Module], params: Params, tmp_path: Path
) -> None:
    sections = {
        "autoencoder": autoencoder_section(params, steps=2),
        "calm": calm_section(params, steps=2),
        "transformer": transformer_section(params, steps=2),
    }
    kept: list[tuple[int, nn.Module]] = []
    run = Run(keep=lambda done, model: kept.append((done, model)), kept_after=frozenset({2}))
    trained = training(params.model_copy(update=sections), tmp_path, run)
    assert kept == [(2, trained)]
    sevenths = {"runtime": params.runtime.model_copy(update={"gradient_accumulation": 7})}
    with pytest.raises(CalmError, match="gradient_accumulation 7"):
        training(params.model_copy(update=sections | sevenths), tmp_path, run)
