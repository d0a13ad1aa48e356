"""Models as folders that describe themselves.

config.json holds the kind of model, the context it was trained with and its shape; model.safetensors the
float32 weights; tokenizer.json the tokenizer. A CALM carries its frozen autoencoder in a folder inside its own. The
model card, README.md, comes later in the pipeline (``model_card``).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calm_core.artefacts import read_json, write_json
from calm_core.errors import CalmError, one_line
from calm_core.tokenizer import load_tokenizer
from calm_core.whole_files import load_tensors, move_into_place, save_tensors, scratch_folder

Model = TypeVar("Model", bound=nn.Module)

AUTOENCODER = "autoencoder"
"""The folder of a CALM's autoencoder inside the CALM's own."""

_COUNTS = {"layers", "encoder_layers", "decoder_layers", "blocks"}
_SIZES = {
    "vocabulary_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "latent_size",
    "heads",
    "key_value_heads",
    "noise_size",
}
_STEPS, MOST_STEPS = {"training_steps", "sampling_steps", "steps"}, 10_000
"""Keys of config.json that count layers, measure something, or count a head's steps."""


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
    known = isinstance(values, dict) and isinstance(values.get("kind"), str) and "context_tokens" in values
    if not known or not (values["context_tokens"] is None or _is_size(values["context_tokens"])):
        raise CalmError(
            f"{folder}/config.json is no model's of this project; `calm import-checkpoint` converts the reference's"
        )
    return values


def load_model(model_class: type[Model], config_class: type, folder: Path) -> Model:
    """The model that ``save_model`` wrote, on the CPU, in evaluation mode and without gradients.

    Takes memory for the weights that there are, whatever config.json claims.

    Raises:
        CalmError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    values = read_config(folder)
    kind = model_class.__name__.lower()
    if values.pop("kind") != kind:
        raise CalmError(f"{folder} holds no model of kind {kind!r}; see its config.json")
    del values["context_tokens"]
    weights = load_tensors(
        folder / "model.safetensors", f"{folder} is incomplete or damaged: `dvc repro` makes it anew"
    )
    try:
        _require_sizes_of(weights, values)
        config: Any = pydantic.TypeAdapter(config_class).validate_python(values)
        with torch.device("meta"):
            model = model_class(config)
        # Copies, since the file may be mapped where processors read slowly, and may change under a mapping.
        copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        model.load_state_dict(copies, assign=True)
    except (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        raise CalmError(f"{folder} is incomplete or damaged: {one_line(error)}; `dvc repro` makes it anew") from None
    return model.eval().requires_grad_(False)


def _require_sizes_of(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Raise ValueError if ``config`` has a size that no model with ``weights`` has; building it could take for ever."""
    numbers = sum(weight.numel() for weight in weights.values())
    for key, value in config.items():
        if isinstance(value, dict):
            _require_sizes_of(weights, value)
        most = len(weights) if key in _COUNTS else MOST_STEPS if key in _STEPS else numbers if key in _SIZES else None
        if most is not None and not (_is_size(value) and value <= most):
            raise ValueError(f"{key} is {value!r}, but there are {len(weights)} weights of {numbers} numbers")
    if wrong := [name for name, weight in weights.items() if not weight.is_floating_point()]:
        raise ValueError(f"{wrong[0]} holds {weights[wrong[0]].dtype}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 40


def load_model_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved beside a model."""
    return load_tokenizer(folder / "tokenizer.json")


def count_parameters(model: nn.Module) -> int:
    """How many trainable numbers ``model`` holds."""
    return sum(parameter.numel() for parameter in model.parameters())
