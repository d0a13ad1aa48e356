"""Models of the Hugging Face hub by their names, as local folders: fetched once, then from the cache, offline too.

Notable:
- a folder that is there wins, and what can only be meant as a path (./x, /x, models/x, or a/b where a folder a is here)
  is never asked of the hub: a typing error must not fetch a stranger's model;
- only configs, tokenizers, weights and the card are fetched; pickled weights (.bin) only where there are no others.
"""

import re
from pathlib import Path

from calm_core.errors import CalmError, one_line

FETCHED = ("*.json", "*.safetensors", "README.md")
"""Patterns of the files of a model that are fetched."""

PICKLED = "*.bin"
"""Pattern of the files that are fetched too where there are no safetensors."""

NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
"""OWNER/NAME or OWNER/NAME@REVISION."""


def local_folder(name: str | Path) -> Path:
    """The folder ``name``, or that of the files of the model OWNER/NAME[@REVISION] of the Hugging Face hub.

    A REVISION is a branch, a tag or a whole commit hash; by default it is the main branch as it is now, or as it was
    last seen if the hub cannot be reached. The files lie in the hub's own cache (HF_HOME), as links; HF_ENDPOINT,
    HF_TOKEN and HF_HUB_OFFLINE mean what they mean to every program that uses the hub.

    Raises:
        CalmError: ``name`` is no folder and no name on the hub; the hub has no such model or revision, or does not
            give it; it cannot be reached and the cache has no whole copy.
    """
    if Path(name).is_dir():
        return Path(name)
    found = NAME.fullmatch(str(name))
    if found is None or ".." in str(name) or _is_path(Path(name)):
        raise CalmError(
            f"{name} is no folder; a model is a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub"
        )
    repository, revision = found["repository"], found["revision"]
    folder = _fetched(repository, revision, FETCHED)
    if not any(folder.rglob("*.safetensors")):
        folder = _fetched(repository, revision, (*FETCHED, PICKLED))
    return folder


def repository_of(name: str | Path) -> str | None:
    """OWNER/NAME of a ``name`` that ``local_folder`` has taken for one on the hub; None where it is a folder."""
    found = None if Path(name).is_dir() else NAME.fullmatch(str(name))
    return found and found["repository"]


def _is_path(name: Path) -> bool:
    return name.exists() or name.parent.exists() or name.parts[0] == "models"


def _fetched(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Here, since it takes long, and reads the variables that name the caches as it is imported.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    absent, hub = f"{repository} is no folder here", "the Hugging Face hub"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise CalmError(
            f"{absent}; {hub} shows it under conditions: accept them on its page, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CalmError(f"{absent}; {hub} has no such model, or a private one, which takes `hf auth login`") from None
    except RevisionNotFoundError:
        raise CalmError(
            f"{absent}; {hub} has it without a revision {revision!r}: name a branch, tag or commit"
        ) from None
    except LocalEntryNotFoundError:
        raise CalmError(
            f"{absent}; {hub} cannot be reached, and its cache has no whole copy: name a folder, or go "
            "online without HF_HUB_OFFLINE"
        ) from None
    except Exception as error:  # the library's HTTP client has errors of its own, which are no part of its interface
        raise CalmError(f"{absent}, and cannot be fetched from {hub}: {one_line(error)}") from None
