"""Models as folders that describe themselves.

config.json holds the kind of model, the context it was trained with and its shape; model.safetensors the
float32 weights; tokenizer.json the tokenizer. A CALM carries its frozen autoencoder in a folder inside its own. The
model card, README.md, comes later in the pipeline (``model_card``).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from calm_core.artefacts import read_json, write_json
from calm_core.errors import CalmError, one_line
from calm_core.tokenizer import load_tokenizer
from calm_core.whole_files import move_into_place, save_tensors, scratch_folder

Model = TypeVar("Model", bound=nn.Module)

AUTOENCODER = "autoencoder"
"""The folder of a CALM's autoencoder inside the CALM's own."""


def save_model(model: nn.Module, tokenizer: Tokenizer | None, folder: Path, context_tokens: int | None = None) -> None:
    """Write a model whose ``config`` is a dataclass into ``folder``, file by file, each whole or not at all.

    ``context_tokens`` is the context that a language model was trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    kind = type(model).__name__.lower()
    write_json(folder / "config.json", {"kind": kind, "context_tokens": context_tokens, **asdict(config)})
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors")
    if tokenizer is not None:
        with scratch_folder(folder) as scratch:
            tokenizer.save(str(scratch / "tokenizer.json"))
            move_into_place(scratch / "tokenizer.json", folder / "tokenizer.json")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in ``folder`` says; raises CalmError where there is none or it is no model's."""
    if not folder.is_dir():
        raise CalmError(f"{folder} is no folder; a model's folder holds config.json and model.safetensors")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or "context_tokens" not in values:
        raise CalmError(
            f"{folder}/config.json is no model's of this project; `calm import-checkpoint` converts the reference's"
        )
    return values


def load_model(model_class: type[Model], config_class: type, folder: Path) -> Model:
    """The model that ``save_model`` wrote, on the CPU, in evaluation mode and without gradients.

    Raises:
        CalmError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    values = read_config(folder)
    kind = model_class.__name__.lower()
    if values.pop("kind") != kind:
        raise CalmError(f"{folder} holds no model of kind {kind!r}; see its config.json")
    del values["context_tokens"]
    try:
        model = model_class(pydantic.TypeAdapter(config_class).validate_python(values))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (pydantic.ValidationError, SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise CalmError(f"{folder} is incomplete or damaged: {one_line(error)}; `dvc repro` makes it anew") from None
    return model.eval().requires_grad_(False)


def load_model_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved beside a model."""
    return load_tokenizer(folder / "tokenizer.json")


def count_parameters(model: nn.Module) -> int:
    """How many trainable numbers ``model`` holds."""
    return sum(parameter.numel() for parameter in model.parameters())
