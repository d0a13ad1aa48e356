"""Small models to write side by side: random ones, and ones that never end by themselves."""

import math
from pathlib import Path

import numpy as np
import pytest

from calm_core.inference.language_model import LanguageModel, load_language_model
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.tokens.tokenizer import train_tokenizer
from tests.calm_core.known_models import NEVER, bigram_transformer, coin_calm
from tests.support.tiny_models import TEXT, VOCABULARY, write_models


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random CALM (K = 3) and Transformer."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def models(folders: Path) -> dict[str, LanguageModel]:
    return {name: load_language_model(folders / name) for name in ("calm", "transformer")}


@pytest.fixture(scope="session")
def endless_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``folders``, but what follows is a letter or a space, so that no text ends by itself."""
    folder = tmp_path_factory.mktemp("endless")
    tokenizer = train_tokenizer([TEXT], VOCABULARY)
    letters = [tokenizer.token_to_id(character) for character in "abcdefghijklmnopqrstuvwxyzĠ"]
    table = np.full((VOCABULARY, VOCABULARY), math.exp(NEVER))
    table[:, letters] = 1 / len(letters)
    size = len(letters)
    patches = [
        [[letters[(token + first) % size], letters[(3 * token + first) % size]] for first in (0, 7)]
        for token in range(VOCABULARY)
    ]
    calm, autoencoder = coin_calm(patches)
    save_model(calm, tokenizer, folder / "calm", 24)
    save_model(autoencoder, tokenizer, folder / "calm" / AUTOENCODER)
    save_model(bigram_transformer(table), tokenizer, folder / "transformer", 24)
    return folder
