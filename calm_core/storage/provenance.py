"""Provenance and integrity of artefacts, by SHA-256.

The description beside tokens and latents lists the hash of each file in the folder; that of the latents also those of
their autoencoder and tokens. A stage verifies its inputs before it works: a damaged shard, or files of different runs
mixed, is an error and not a worse model.
"""

from pathlib import Path
from typing import Any

from calm_core.errors import CalmError
from calm_core.storage.checksum import sha256
from calm_core.storage.json_io import read_json, write_json

DESCRIPTION = "description.json"
"""The file that describes the tokens or latents in its folder, with the hash of each of their files."""

TOKENIZER, WEIGHTS = "tokenizer.json", "model.safetensors"


def describe_latents(latents: Path, autoencoder: Path, tokens: Path, counts: dict[str, int]) -> None:
    """Write the description of the encoded corpus in ``latents``: ``counts``, hashes, and what it was made from."""
    description = {
        **counts,
        "autoencoder_sha256": sha256(autoencoder / WEIGHTS),
        "tokens_sha256": sha256(tokens / DESCRIPTION),
        "sha256": {path.name: sha256(path) for path in sorted(latents.glob("*.safetensors"))},
    }
    write_json(latents / DESCRIPTION, description)


def describe_no_latents(latents: Path) -> None:
    """Write the description of a folder without latents, which the training computes instead."""
    write_json(latents / DESCRIPTION, {"latents": "online", "sha256": {}})


def require_intact(folder: Path) -> None:
    """Read all files of tokens or latents in ``folder``; raises CalmError if one is missing, changed or foreign."""
    expected = _hashes(folder)
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise CalmError(f"{folder / name} is missing; delete {folder} and run `dvc repro`")
        if sha256(folder / name) != digest:
            raise CalmError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {DESCRIPTION}; "
                f"delete {folder} and run `dvc repro`"
            )
    # A shard of another run would be read with the others, since readers glob for shards.
    foreign = sorted({path.name for path in folder.glob("*.safetensors")} - expected.keys())
    if foreign:
        raise CalmError(f"{folder / foreign[0]} is not named in {DESCRIPTION}; delete {folder} and run `dvc repro`")


def require_latents_of(latents: Path, autoencoder: Path, tokens: Path) -> None:
    """Raise CalmError unless ``latents`` are what the autoencoder in folder ``autoencoder`` made of ``tokens``."""
    description = _description(latents)
    for key, path in (("autoencoder_sha256", autoencoder / WEIGHTS), ("tokens_sha256", tokens / DESCRIPTION)):
        if description.get(key) != sha256(path):
            raise CalmError(f"{latents} was not made from {path}; run `dvc repro --force encode_corpus`")


def require_tokenizer_of(model: Path, tokens: Path) -> None:
    """Raise CalmError unless the model in folder ``model`` goes with the tokenizer that made ``tokens``."""
    if not (model / TOKENIZER).is_file() or sha256(model / TOKENIZER) != sha256(tokens / TOKENIZER):
        raise CalmError(
            f"{model / TOKENIZER} is not the tokenizer that made {tokens}; "
            f"restore both with `dvc checkout`, or delete {model} and run `dvc repro`"
        )


def _description(folder: Path) -> dict[str, Any]:
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict):
        raise CalmError(f"{folder / DESCRIPTION} is damaged; delete {folder} and run `dvc repro`")
    return description


def _hashes(folder: Path) -> dict[str, str]:
    description = _description(folder)
    try:
        found = dict(description.get("sha256", {}))
        # Tokens list hashes a split, latents and the tokenizer in one table.
        for split in description.get("splits", {}).values():
            found.update(split["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {"": ""}
    for name in found:
        if Path(name).name != name or name in ("", ".."):  # a description names files of its own folder
            raise CalmError(f"{folder / DESCRIPTION} is damaged; delete {folder} and run `dvc repro`")
    return found
