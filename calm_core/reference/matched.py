"""A checkpoint's tensors as those of a model of ours: compared with it, and written as its folder.

Notable: names and shapes are compared before any number is read; then tensors pass from file to file a piece at a time,
so that memory does not grow with the model. They keep 16 bits where they have them: ``load_model`` makes float32 of
them without loss, in float32 the folder would be twice as large, and export gives back what came.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn

from calm_core.errors import CalmError
from calm_core.reference.names import DTYPES, EMBEDDING, OUTPUT_MATRIX
from calm_core.reference.streamed_weights import StreamedTensor, write_weights
from calm_core.reference.untrusted_weights import Stored, StoredTensor
from calm_core.storage.model_folder import save_description

HELD: dict[Any, torch.dtype] = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
"""Types that a model's folder keeps; of all others it has float32."""


class Found(NamedTuple):
    """A model without numbers, on the meta device, and the stored tensor of each of its names."""

    model: Any
    stored: Stored


def matched(
    model_class: Any,
    shape: Any,
    names_of: Callable[[nn.Module], Mapping[str, Sequence[str]]],
    weights: Stored,
    disagreements: Sequence[str],
    source: str,
) -> Found:
    """A model of ``shape`` and its ``weights``, whose names ``names_of`` tells: by ours theirs, the first one counts.

    Raises:
        CalmError: with all that is missing, left over or misshapen, and ``disagreements`` with config.json.
    """
    # For names and shapes alone.
    with torch.device("meta"):
        model: nn.Module = model_class(shape)
    own, names = model.state_dict(), names_of(model)
    copies = {name: [theirs for theirs in names[name] if theirs in weights] for name in own}
    # Tools that save no tensor twice drop one copy, with all that stands under its first name.
    first_names = {name.split(".")[0] for name in weights}
    # A second copy may be missing: one name of the tied matrix, or the whole second name of the energy head.
    lacking = [
        theirs
        for name, found in copies.items()
        for theirs in names[name]
        if theirs not in weights
        and not (found and (theirs in (EMBEDDING, OUTPUT_MATRIX) or theirs.split(".")[0] not in first_names))
    ]
    known = {theirs for group in names.values() for theirs in group}
    misshapen = [
        f"{theirs} {list(weights[theirs].shape)} instead of {list(own[name].shape)}"
        for name, found in copies.items()
        for theirs in found
        if weights[theirs].shape != tuple(own[name].shape)
    ]
    problems = {
        "config.json:": disagreements,
        "lacks": lacking,
        "has unknown": sorted(set(weights) - known),
        "wrong shapes:": misshapen,
        f"neither of {', '.join(DTYPES)}:": sorted(
            name for name in known & set(weights) if weights[name].dtype not in DTYPES.values()
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{problem} {', '.join(names)}" for problem, names in problems.items() if names)
        raise CalmError(f"{source} is refused: {told}")
    for first, *others in copies.values():
        for second in others:
            # Two names for one tensor may differ in a file that was edited; picking one would change the model.
            if _digest(weights[second]) != _digest(weights[first]):
                raise CalmError(f"{source} is refused: {second} differs from {first}; here they are one tensor")
    return Found(model, {name: weights[found[0]] for name, found in copies.items()})


def _digest(weight: StoredTensor) -> tuple[Any, bytes]:
    """What tells tensors apart; of one at a time, since of .bin files one is open at a time."""
    digest = hashlib.sha256()
    for piece in weight.pieces():
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return weight.dtype, digest.digest()


def require_same(first: Found, second: Found, told: str) -> None:
    """Raise CalmError, which begins with ``told``, unless both models have the same numbers, bar rounding."""
    if first.model.config != second.model.config:
        raise CalmError(f"{told}: {first.model.config} and {second.model.config}; leave --autoencoder out to keep it")
    for name, stored in first.stored.items():
        for one, other in zip(stored.pieces(), second.stored[name].pieces(), strict=True):
            # One of the two may have been saved in fewer bits.
            coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            if not torch.equal(one.to(coarser), other.to(coarser)):
                raise CalmError(f"{told}: their {name} differ; leave --autoencoder out to keep it")


def write_found(
    found: Found,
    tokenizer: Tokenizer | None,
    folder: Path,
    context_tokens: int | None = None,
    opening: Sequence[int] | None = None,
    document_marks: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a model's folder as ``save_model`` does, but for weights of 16 bits, which it keeps."""
    save_description(found.model, tokenizer, folder, context_tokens, opening, document_marks, base_model)
    weights = {
        name: StreamedTensor(HELD.get(stored.dtype, torch.float32), stored.shape, stored.pieces)
        for name, stored in sorted(found.stored.items(), key=_file_and_name)
    }
    write_weights(weights, folder / "model.safetensors")


def _file_and_name(item: tuple[str, StoredTensor]) -> tuple[str, str]:
    """Of .bin files one is open at a time, so that one comes after the other; all else is by our names."""
    name, stored = item
    return (stored.path.name if stored.path.suffix == ".bin" else "", name)
