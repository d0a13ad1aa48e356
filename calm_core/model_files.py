"""Models as folders: config.json (kind and shape), model.safetensors (weights), tokenizer.json."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from calm_core.artefacts import read_json, write_json
from calm_core.errors import CalmError
from calm_core.tokenizer import load_tokenizer

Model = TypeVar("Model", bound=nn.Module)


def save_model(model: nn.Module, kind: str, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model whose ``config`` is a dataclass, float32, into the existing ``folder``."""
    config: Any = model.config
    write_json(folder / "config.json", {"kind": kind, **asdict(config)})
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))


def load_model(model_class: type[Model], config_class: type, folder: Path) -> Model:
    """The model that ``save_model`` wrote, on the CPU, in evaluation mode and without gradients.

    Raises:
        CalmError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    values = read_json(folder / "config.json")
    kind = model_class.__name__.lower()
    if not isinstance(values, dict) or values.pop("kind", None) != kind:
        raise CalmError(f"{folder} holds no model of kind {kind!r}; see its config.json")
    try:
        model = model_class(pydantic.TypeAdapter(config_class).validate_python(values))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (pydantic.ValidationError, SafetensorError, FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CalmError(f"{folder} is incomplete or damaged: {reason}; `dvc repro` makes it anew") from None
    return model.eval().requires_grad_(False)


def load_model_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved beside a model."""
    return load_tokenizer(folder / "tokenizer.json")


def count_parameters(model: nn.Module) -> int:
    """How many trainable numbers ``model`` holds."""
    return sum(parameter.numel() for parameter in model.parameters())
