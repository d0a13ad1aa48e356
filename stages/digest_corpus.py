"""Stage digest_corpus: look at the text in every run, so that `tokenise` runs again when it has changed.

DVC compares the inputs that dvc.yaml names; which files params.yaml names it cannot know.
"""

from pathlib import Path

from calm_core.corpus.digest import corpus_digest
from calm_core.params import Params
from calm_core.storage.json_io import write_json
from stages.runner.run import CHECKPOINTS, run_stage
from stages.runner.users_tree import in_users_tree


def main(params: Params) -> None:
    """Write what stands for the text: the same bytes as before for the same text."""
    # The record, too, is that of the user's tree: a copy hashes nothing anew.
    with in_users_tree():
        digest = corpus_digest(params, CHECKPOINTS)
    write_json(Path("data/corpus.json"), digest)


if __name__ == "__main__":
    run_stage("digest_corpus", main)
