"""The recorded checkpoints in the reference implementation's layout, and what is said of one that is refused."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.reference.importing import import_checkpoint

DATA = Path(__file__).parent / "data"
KINDS = ("autoencoder", "energy", "diffusion", "flow")


def reference_weights(kind: str) -> dict[str, Tensor]:
    """All tensors as the reference saves them, second copies included."""
    stored = load_file(DATA / "energy.safetensors")
    stored["ae_model.decoder.lm_head_weight"] = stored["ae_model.encoder.embed_tokens.weight"].clone()
    if kind == "autoencoder":
        return {n.removeprefix("ae_model."): w for n, w in stored.items() if n.startswith("ae_model.")}
    head = {name: weight for name, weight in stored.items() if name.startswith("generative_head.")}
    if kind == "energy":
        return stored | {n.replace("generative_head.", "mlp_generator."): w.clone() for n, w in head.items()}
    heads = load_file(DATA / "heads.safetensors")
    backbone = {name: weight for name, weight in stored.items() if name not in head}
    return backbone | {n.removeprefix(f"{kind}."): w for n, w in heads.items() if n.startswith(f"{kind}.")}


def write_reference(kind: str, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """Write the checkpoint of ``kind`` (or other ``weights`` in its place) to ``folder``/kind."""
    folder = folder / kind
    folder.mkdir(parents=True)
    config = "autoencoder" if kind == "autoencoder" else "language_model"
    shutil.copy(DATA / f"{config}.json", folder / "config.json")
    save_file(reference_weights(kind) if weights is None else weights, folder / "model.safetensors")
    return folder


def refusal(source: Path, destination: Path) -> str:
    """The one line that the import of ``source`` ends in; nothing is left of ``destination``."""
    with pytest.raises(CalmError) as caught:
        import_checkpoint(source, destination)
    assert not destination.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)
