"""Models as folders that describe themselves.

config.json holds the kind of model, the context it was trained with, what stands before a prompt, and its shape;
model.safetensors the weights, float32 or the 16 bits that an imported model came with; tokenizer.json the tokenizer. A
CALM carries its frozen autoencoder in a folder inside its own. The model card, README.md, is written later in the
pipeline (``report.model_card``).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pydantic
import torch
from tokenizers import Tokenizer
from torch import nn

from calm_core.errors import CalmError, one_line
from calm_core.storage.atomic import move_into_place, scratch_folder
from calm_core.storage.base_model import BASE_MODEL
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.tensors import load_tensors, save_tensors

Model = TypeVar("Model", bound=nn.Module)

AUTOENCODER = "autoencoder"
"""The folder of a CALM's autoencoder inside the CALM's own."""

ORIGIN = "reference.json"
"""A file beside an imported model, for the way back: what it came as (``reference.origin``)."""

POST_PROCESSOR = "post_processor"
"""The value of ``document_marks`` in the config.json of a language model: its documents are marked by the tokenizer's
own post-processor, say a BOS before each. Where the key is absent, an end-of-text token follows each document."""

UNTOLD = {"norm_epsilon": 1e-6}
"""Fields of a shape that config.json names only where their value is another: they came later than folders did."""

REMEDY = "`dvc repro` makes a run's own model anew, any other has to be imported or copied again"
"""What to do about a folder that lacks a file or has a damaged one: no stage makes models that came from elsewhere."""


def save_model(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    folder: Path,
    context_tokens: int | None = None,
    opening: Sequence[int] | None = None,
    document_marks: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a model whose ``config`` is a dataclass into ``folder``, each file atomically.

    ``context_tokens`` is the context that a language model was trained with, ``opening`` the token ids of a patch that
    stand before its prompts (``tokens.openings``), ``document_marks`` the kind of marks around the documents that it
    read (``tokens.document_marks``), ``base_model`` the model of the hub that it was made from.
    """
    save_description(model, tokenizer, folder, context_tokens, opening, document_marks, base_model)
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors")


def save_description(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    folder: Path,
    context_tokens: int | None = None,
    opening: Sequence[int] | None = None,
    document_marks: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write what ``save_model`` writes, bar the weights; of ``document_marks`` only ``POST_PROCESSOR`` is named."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    kind = type(model).__name__.lower()
    about = {"kind": kind, "context_tokens": context_tokens, "opening": None if opening is None else list(opening)}
    marks = {"document_marks": document_marks} if document_marks == POST_PROCESSOR else {}
    base = {} if base_model is None else {BASE_MODEL: base_model}
    write_json(folder / "config.json", {**about, **marks, **base, **asdict(config, dict_factory=_told)})
    if tokenizer is not None:
        # tokenizer.save is not atomic by itself.
        with scratch_folder(folder) as scratch:
            tokenizer.save(str(scratch / "tokenizer.json"))
            move_into_place(scratch / "tokenizer.json", folder / "tokenizer.json")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in ``folder`` says; raises CalmError where there is none or it is no model's."""
    if not folder.is_dir():
        raise CalmError(f"{folder} is no folder; a model's folder holds config.json and model.safetensors")
    values = read_json(folder / "config.json", REMEDY)
    # Another project's config.json is the likely mistake, the reference's above all: it gets the command that converts
    # it.
    known = isinstance(values, dict) and isinstance(values.get("kind"), str) and "context_tokens" in values
    if not known or not (values["context_tokens"] is None or _is_size(values["context_tokens"])):
        raise CalmError(
            f"{folder}/config.json is no model's of this project; `calm import-checkpoint` converts the reference's"
            " and Llamas"
        )
    return values


def load_model(model_class: type[Model], folder: Path) -> Model:
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
    for key in ("opening", "document_marks", BASE_MODEL):  # folders of earlier versions have none
        values.pop(key, None)
    weights = load_tensors(folder / "model.safetensors", f"{folder} is incomplete or damaged: {REMEDY}")
    try:
        # Integers would convert without an error, to a model that is merely bad.
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise ValueError(f"{name} holds {weight.dtype}")
        # The constructor of a model says which dataclass its shape is, and the types of that what a size may be.
        config_class = get_type_hints(model_class.__init__)["config"]
        # As JSON, since strict validation takes a mapping for a dataclass there alone, and no "8" or true for a size.
        config: Any = pydantic.TypeAdapter(config_class).validate_json(json.dumps(values), strict=True)
        # No memory for sizes that config.json claims: the file's own tensors become the parameters.
        with torch.device("meta"):
            model = model_class(config)
        # Copies: a mapped file may lie on a slow disk, and may change under the mapping.
        copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        model.load_state_dict(copies, assign=True)
    except (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        raise CalmError(f"{folder} is incomplete or damaged: {one_line(error)}; {REMEDY}") from None
    return model.eval().requires_grad_(False)


def _told(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name not in UNTOLD or value != UNTOLD[name]}


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 40


def require_new_folder(destination: Path) -> None:
    """Raise CalmError if anything stands at ``destination``."""
    if destination.exists() or destination.resolve().exists():  # "new/.." is where we are
        raise CalmError(f"{destination} exists; name a new folder, or remove it first")


def count_parameters(model: nn.Module) -> int:
    """How many trainable numbers ``model`` holds."""
    return sum(parameter.numel() for parameter in model.parameters())
