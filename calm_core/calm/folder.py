"""A CALM's folder: the model, and its frozen autoencoder in a folder inside. Neither is of use without the other.

A model with a token head writes its tokens itself: its folder has no autoencoder, or an empty one.
"""

from pathlib import Path

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.errors import CalmError
from calm_core.storage.model_folder import AUTOENCODER, load_model


def load_calm(folder: Path) -> tuple[Calm, Autoencoder | None]:
    """The CALM in ``folder`` and its autoencoder, None with a token head, as ``load_model`` gives them.

    Raises:
        CalmError: a file of either is missing or damaged, or the two do not go together.
    """
    model = load_model(Calm, folder)
    if isinstance(model.head, TokenHead):
        return model, None
    autoencoder = load_model(Autoencoder, folder / AUTOENCODER)
    for size in ("vocabulary_size", "patch_size", "latent_size"):
        if (own := getattr(model.config, size)) != (other := getattr(autoencoder.config, size)):
            raise CalmError(f"{folder} is damaged: {size} is {own}, but {other} of the autoencoder in it")
    return model, autoencoder
