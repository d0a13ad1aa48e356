"""The models that the user's trainings go on from: where they lie, and what stands for them in data/initial.

DVC cannot know which files `calm.initial` and `transformer.initial` name, so the stage digest_corpus writes their
hashes to data/initial/MODEL.json, upon which the trainings depend.
"""

from pathlib import Path
from typing import get_args

from calm_core.errors import CalmError
from calm_core.params import LanguageModelSection, Params
from calm_core.storage.base_model import base_model_of
from stages.runner.users_tree import in_users_tree, users_tree

SECTIONS: tuple[LanguageModelSection, ...] = get_args(LanguageModelSection)

INITIAL = Path("data/initial")
"""By model, the hash of each of its files; none where the run trains it from the beginning."""

_OWN = ("models/autoencoder", "models/calm", "models/transformer", "models/calm_checkpoints",
        "models/transformer_checkpoints", "repeats", "beside")  # fmt: skip
"""What a run writes, and DVC removes before."""


def initial_folder(section: LanguageModelSection, params: Params) -> Path | None:
    """The folder that ``section``.initial names, from the user's own tree or on the hub; None where it names none.

    Raises:
        CalmError: the name is neither, or cannot be fetched; the run would write over it.
    """
    name = getattr(params, section).initial
    if not name:
        return None
    # Imported for those alone who have such a model: digest_corpus runs each time.
    from calm_core.training.initial import named_folder

    tree = users_tree()
    try:
        with in_users_tree():
            folder = tree / named_folder(name)
    except CalmError as error:
        raise CalmError(f"{section}.initial: {error}") from None
    if own := next((own for own in _OWN if folder.resolve().is_relative_to((tree / own).resolve())), None):
        raise CalmError(f"{section}.initial is {name}, but the run writes {own} anew; copy the model to another folder")
    return folder


def initial_base_model(name: str, folder: Path | None) -> str | None:
    """What a model that goes on from the one in ``folder``, which ``name`` names, has for its ``base_model``."""
    if folder is None:
        return None
    with in_users_tree():
        return base_model_of(name, folder)
