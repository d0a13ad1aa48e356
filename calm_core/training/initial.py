"""The model that a training goes on from, where `calm.initial` or `transformer.initial` names one.

Notable:
- its sizes stand in params.yaml, as those of every run, since costs, plans and reports are computed from them: a model
  of other sizes is refused, with a list of what to set;
- its tokenizer has to be the run's, for its embeddings mean nothing else, and so has what tells documents apart;
- the context, the batch and all that a training has beside a shape are free;
- an autoencoder that came with a CALM stays as it is.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from calm_core.errors import CalmError
from calm_core.params import LanguageModelSection, Params
from calm_core.storage.checksum import sha256
from calm_core.storage.hub import local_folder
from calm_core.storage.json_io import read_json
from calm_core.storage.provenance import TOKENIZER, WEIGHTS
from calm_core.tokens.document_marks import document_marks, told_kind
from calm_core.tokens.tokenizer import load_tokenizer, require_fit, template_ids, vocabulary_size_of

CONFIG = "config.json"

BACKBONE_SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "key_value_heads", "rope_theta")
AUTOENCODER_SIZES = (
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "latent_size",
    "encoder_layers",
    "decoder_layers",
)
HEAD_SIZES: Mapping[str, Mapping[str, str]] = {
    "tokens": {
        "hidden_size": "token_hidden_size",
        "intermediate_size": "token_intermediate_size",
        "layers": "token_layers",
    },
    "energy": {"blocks": "head_blocks", "noise_size": "noise_size"},
    "diffusion": {"blocks": "head_blocks", "sampling_steps": "diffusion_steps"},
    "flow": {"blocks": "head_blocks", "solver": "flow_solver", "steps": "flow_steps"},
}
"""By kind of head, the field of its config and the key of section calm."""


def named_folder(initial: str) -> Path:
    """The folder that an ``initial`` of params.yaml names, here or on the hub; errors as of ``local_folder``."""
    return local_folder(os.path.expanduser(initial))  # noqa: PTH111 - a path loses the ./ that rules the hub out


def files_of(folder: Path) -> dict[str, Path]:
    """The files that make the one model in ``folder``, by name; its tokenizer if it has one of its own."""
    names = (CONFIG, WEIGHTS, TOKENIZER) if (folder / TOKENIZER).is_file() else (CONFIG, WEIGHTS)
    return {name: folder / name for name in names}


def require_unchanged(folder: Path, digest: Path) -> None:
    """Raise CalmError unless the model in ``folder`` is the one whose hashes, by name of file, are in ``digest``."""
    expected = read_json(digest)
    files = files_of(folder)
    if not isinstance(expected, dict) or expected.keys() != files.keys():
        raise CalmError(f"{folder} is not the model that {digest} is of; run `dvc repro`")
    for name, path in files.items():
        try:
            found = sha256(path)
        except OSError as error:
            raise CalmError(f"{path} cannot be read: {error.strerror}") from None
        if found != expected[name]:
            raise CalmError(f"{path} has changed since the run began; run `dvc repro`")


def require_agreement(section: LanguageModelSection, params: Params, folder: Path, tokenizer: Path | None) -> None:
    """Raise CalmError unless the model in ``folder``, which ``section``.initial names, goes with ``params``.

    ``tokenizer`` is the run's, None if it trains one. The error has each param to set, as `dvc exp run` takes it.
    """
    named = getattr(params, section).initial
    sizes, own = _sizes(section, folder), _tokenizer_of(folder)
    values = params.model_dump()
    sizes["tokenizer.vocabulary_size"] = vocabulary_size_of(own)
    settings = {key: value for key, value in sizes.items() if _value(values, key) != value}
    config = read_json(folder / CONFIG)
    kind = told_kind(config, folder / CONFIG)
    # An imported Llama's folder tells what it took from the tokenizer's template, and not how its texts were joined.
    of_llama = bool(before := template_ids(own)[0]) and config.get("opening") == list(before)
    # By what they are: some tokenizers mark documents in the same way by both kinds.
    if not of_llama and document_marks(kind, own) != document_marks(params.tokenizer.document_marks, own):
        settings["tokenizer.document_marks"] = kind
    # As text they have the whole of it: vocabulary, merges, what ends a document.
    there = tokenizer is not None and tokenizer.expanduser().exists()
    if tokenizer is None or not there or load_tokenizer(tokenizer).to_str() != own.to_str():
        # As params.yaml names the folder; one of the hub's models lies in a cache.
        by_name = folder.parts[-len(Path(named).parts) :] == Path(named).parts
        settings["tokenizer.path"] = str((Path(named) if by_name else folder) / TOKENIZER)
    if settings:
        told = " ".join(shlex.join(["-S", f"{key}={value}"]) for key, value in settings.items())
        raise CalmError(f"{section}.initial: {named} needs other params; set them or give `dvc exp run` {told}")


def _sizes(section: LanguageModelSection, folder: Path) -> dict[str, Any]:
    """What params.yaml has to say about the model in ``folder``, by its keys, in their order there."""
    if not (folder / CONFIG).is_file():
        raise CalmError(
            f"{section}.initial: {folder} holds no model; name a folder with config.json and model.safetensors, as "
            "`calm import-checkpoint` makes them"
        )
    # Here: it brings torch, which takes seconds.
    from calm_core.storage.model_folder import AUTOENCODER, read_config

    config = read_config(folder)
    if (kind_of_model := config["kind"]) != section:
        raise CalmError(f"{section}.initial: {folder} holds a model of kind {kind_of_model[:50]!r}; name a {section}'s")
    try:
        sizes: dict[str, Any] = {}
        if section == "calm":
            kind = config["head"]["kind"]
            if kind == "tokens":
                sizes["autoencoder.patch_size"] = config["patch_size"]
            else:
                sizes |= _picked("autoencoder", read_config(folder / AUTOENCODER), AUTOENCODER_SIZES)
        sizes |= _picked(section, config["backbone"], BACKBONE_SIZES)
        if section == "calm":
            sizes |= {"calm.input": config["input"], "calm.head": kind}
            sizes |= {f"calm.{key}": config["head"][field] for field, key in HEAD_SIZES[kind].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise CalmError(f"{folder} is damaged: config.json has no {error}; import or copy it anew") from None
    # They go into a command line.
    if strange := [key for key, value in sizes.items() if not re.fullmatch(r"[\w.+-]{1,50}", str(value))]:
        raise CalmError(f"{folder} is damaged: config.json has no sensible {strange[0]}; import or copy it anew")
    return sizes


def _picked(section: str, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {f"{section}.{name}": config[name] for name in names}


def _tokenizer_of(folder: Path) -> Tokenizer:
    file = folder / TOKENIZER
    if not file.is_file():
        raise CalmError(f"{folder} has no {TOKENIZER}; put the model's there, or import it with --tokenizer")
    tokenizer, rows = load_tokenizer(file), read_json(folder / CONFIG).get("vocabulary_size")
    require_fit(tokenizer, rows if type(rows) is int else 0, str(file))
    return tokenizer


def _value(values: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return values[section][name]
