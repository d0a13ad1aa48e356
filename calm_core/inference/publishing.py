"""A model's folder on the Hugging Face hub, for everyone to load by its name (``storage.hub``).

Notable:
- what is uploaded is what a model consists of, file by file, and nothing else that lies in its folder;
- a model goes only with its card, which says on what it was trained and how it was measured, and only if it loads;
- a hub that shows a model to everyone is not asked to hold a private one.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from calm_core.autoencoder.model import Autoencoder
from calm_core.errors import CalmError, one_line
from calm_core.inference.language_model import load_language_model
from calm_core.storage.base_model import BASE_MODEL
from calm_core.storage.hub import NAME
from calm_core.storage.model_folder import AUTOENCODER, ORIGIN, load_model, read_config
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer
from calm_core.tokens.tokenizer_config import TOKENIZER_CONFIG, prompt_opening, tokenizer_config

Content = Path | bytes
"""What is uploaded: a file as it is, or bytes that are made for the hub."""

Result = TypeVar("Result")

CARD = "README.md"

LOG_IN = "`hf auth login` (huggingface-cli login in older versions) or HF_TOKEN gives one that may write"


def publication(folder: Path, name: str) -> dict[str, Content]:
    """What ``publish`` uploads for the model in ``folder``, by path on the hub; reads ``folder`` alone.

    Beside the folder's own files, with an imported model's reference.json, by which it is exported as it came, a
    tokenizer_config.json, for transformers, and the card with ``name`` for the folder in the lines that load the model.

    Raises:
        CalmError: ``folder`` holds no whole model or no card; ``name`` is none of OWNER/NAME.
    """
    _require_name(name)
    config = read_config(folder)
    kind, context = config["kind"], config["context_tokens"]
    contents: dict[str, Content] = {}
    if kind == "autoencoder":
        load_model(Autoencoder, folder)
    else:
        load_language_model(folder.absolute())
    if not (folder / CARD).is_file():
        base = config.get(BASE_MODEL)
        of_base = f", with `{BASE_MODEL}: {base}` between two lines of --- at its beginning" if base else ""
        raise CalmError(
            f"{folder / CARD} is missing, the card that says what the model is, of which data and how good; "
            f"`dvc repro model_cards` writes it for models/, for another model write one{of_base}"
        )
    files = ["config.json", "model.safetensors", TOKENIZER, ORIGIN]
    if kind == "calm":
        files += [f"{AUTOENCODER}/{file}" for file in files]
    for file in files:
        if (folder / file).is_file():
            contents[file] = folder / file
    if TOKENIZER in contents:
        tokenizer = load_tokenizer(folder / TOKENIZER)
        about = tokenizer_config(tokenizer, context, prompt_opening(config, folder, tokenizer))
        contents[TOKENIZER_CONFIG] = (json.dumps(about, indent=2) + "\n").encode()
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CalmError(f"{folder / CARD} is no UTF-8 text; save it as such") from None
    contents[CARD] = card.replace(f'"models/{kind}"', f'"{name}"').encode()
    return contents


def _require_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    found = NAME.fullmatch(name)
    if found is None or found["revision"] is not None:
        raise CalmError(f"{name} is no name on the Hugging Face hub; OWNER/NAME is needed")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CalmError(f"{name} is no name on the Hugging Face hub: {one_line(error)}") from None


def sizes(contents: Mapping[str, Content]) -> dict[str, int]:
    """Bytes of each of ``contents``."""
    return {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size
        for path, content in contents.items()
    }


def publish(contents: Mapping[str, Content], name: str, private: bool = False) -> str:
    """Upload ``contents``, a ``publication``, to the model ``name`` of the hub in one commit; returns its address.

    The model is made if there is none, for its owner's eyes alone if ``private``. Files that are there under other
    names stay.

    Raises:
        CalmError: nobody is logged in, or has no right to write there; the hub cannot be reached; ``private`` is asked
            for, and the model is there for everyone.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise CalmError(f"{name} cannot be published without a token of the Hugging Face hub; {LOG_IN}")
    api = HfApi()
    address: str = _told(name, lambda: str(api.create_repo(name, private=private or None, exist_ok=True)))
    # That of a model that was there before stays as it was.
    if private and not _told(name, lambda: api.model_info(name)).private:
        raise CalmError(f"{name} is there for everyone to see; make it private on {address}/settings, or name another")
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    _told(name, lambda: api.create_commit(name, operations, commit_message="A model of calm_core, with its card"))
    return address


def _told(name: str, ask: Callable[[], Result]) -> Result:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except HfHubHTTPError as error:
        status: Any = error.response.status_code
        if status in (401, 403):
            raise CalmError(f"{name}: the token is no good there, or may not write; {LOG_IN}") from None
        raise CalmError(f"{name} cannot be published: {one_line(error)}") from None
    except ValueError as error:  # of the library, say of a card whose metadata the hub does not take
        raise CalmError(f"{name} cannot be published: {one_line(error)}") from None
    except Exception as error:  # the library's HTTP client has errors of its own, which are no part of its interface
        raise CalmError(
            f"{name} cannot be published: the hub at {constants.ENDPOINT} cannot be reached ({one_line(error)})"
        ) from None
