"""Stage digest_corpus: look at the text, and at models to go on from, in every run; stages run again if they changed.

DVC compares the inputs that dvc.yaml names; which files params.yaml names it cannot know.
"""

from pathlib import Path

from calm_core.corpus.digest import corpus_digest, file_digests
from calm_core.params import Params
from calm_core.storage.atomic import whole_directory
from calm_core.storage.json_io import write_json
from stages.runner.initial import INITIAL, SECTIONS, initial_folder
from stages.runner.run import CHECKPOINTS, run_stage
from stages.runner.users_tree import in_users_tree


def main(params: Params) -> None:
    """Write what stands for the text and for the models: the same bytes as before for the same ones."""
    models = _initial_files(params)
    # The record, too, is that of the user's tree: a copy hashes nothing anew.
    with in_users_tree():
        text = corpus_digest(params, CHECKPOINTS)
        hashes = {
            name: dict(zip(files, file_digests(list(files.values()), CHECKPOINTS), strict=True))
            for name, files in models.items()
        }
    write_json(Path("data/corpus.json"), text)
    with whole_directory(INITIAL) as folder:
        for name, of_files in hashes.items():
            write_json(folder / f"{name}.json", of_files)


def _initial_files(params: Params) -> dict[str, dict[str, Path]]:
    """By model, the files that it begins from, none in a run from the beginning; refused is what does not fit."""
    models: dict[str, dict[str, Path]] = {"autoencoder": {}, "calm": {}, "transformer": {}}
    for section in SECTIONS:
        folder = initial_folder(section, params)
        if folder is None:
            continue
        # Imported for those alone who have such a model.
        from calm_core.storage.model_folder import AUTOENCODER
        from calm_core.training.initial import files_of, require_agreement

        tokenizer = Path(params.tokenizer.path) if params.tokenizer.path else None
        with in_users_tree():
            require_agreement(section, params, folder, tokenizer)  # here, before any work, and again in the trainings
        models[section] = files_of(folder)
        if section == "calm" and params.calm.has_given_autoencoder:
            models["autoencoder"] = files_of(folder / AUTOENCODER)
    return models


if __name__ == "__main__":
    run_stage("digest_corpus", main)
