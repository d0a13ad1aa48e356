"""A model of this project as the reference implementation saves its own, a Transformer as a Llama (``llama``)."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.folder import load_calm
from calm_core.errors import CalmError
from calm_core.reference.llama import export_llama
from calm_core.reference.names import (
    AUTOENCODER_PREFIX,
    autoencoder_keys,
    calm_keys,
    reference_names,
)
from calm_core.reference.origin import original_types, read_origin
from calm_core.reference.settings import FIXED
from calm_core.reference.streamed_weights import write_model_weights
from calm_core.storage.atomic import whole_directory
from calm_core.storage.hub import local_folder
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import load_model, read_config, require_new_folder


def export_checkpoint(name: str | Path, destination: Path) -> None:
    """Write the model ``name``, a folder's or the hub's, in the layout of the reference implementation.

    ``destination`` is a new folder. A Transformer becomes a LlamaForCausalLM of the transformers library.

    Raises:
        CalmError: ``destination`` exists, or ``name`` is that of no model, or of a CALM that the reference has not.
    """
    require_new_folder(destination)
    source = local_folder(name)
    kind, origin = read_config(source)["kind"], read_origin(source)
    if kind == "transformer":
        with whole_directory(destination) as folder:
            export_llama(source, folder, origin)
        return
    weights: dict[str, Tensor] = {}
    shape: dict[str, Any]
    if kind == "autoencoder":
        alone = load_model(Autoencoder, source)
        weights, shape = _named(alone), autoencoder_keys(alone.config)
        shape["architectures"] = ["Autoencoder"]
    elif kind == "calm":
        model, autoencoder = load_calm(source)
        if autoencoder is None:
            raise CalmError(f"{source} has a token head, which the reference implementation's models have not")
        if model.config.input != "tokens":
            raise CalmError(f"{source} takes latents as input, which the reference implementation's models do not")
        weights = _named(model) | {AUTOENCODER_PREFIX + name: w for name, w in _named(autoencoder).items()}
        shape = calm_keys(model.config)
    else:
        raise CalmError(f"{source} is of kind {kind!r}; an autoencoder, a CALM or a Transformer is needed")
    types = original_types(weights, origin, source)
    with whole_directory(destination) as folder:
        # A model that was imported gets its own config.json back, with the keys that mean nothing here; sizes come from
        # the model.
        write_json(folder / "config.json", {**(origin["config"] or FIXED), **shape})
        write_model_weights(weights, types, folder)
        if (source / "tokenizer.json").is_file():
            shutil.copy(source / "tokenizer.json", folder)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of ``model`` under the reference's names, second copies as the same tensor."""
    own = model.state_dict()
    return {theirs: own[name] for name, group in reference_names(model).items() for theirs in group}
