"""Stage tokenise: the corpus -> data/tokens."""

from pathlib import Path

from calm_core.artefacts import whole_directory
from calm_core.params import Params
from calm_core.tokenising import tokenise
from stages.running import run_stage


def main(params: Params) -> None:
    """Write tokenizer, token shards and their description."""
    with whole_directory(Path("data/tokens")) as folder:
        splits = tokenise(params, folder)["splits"]
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


if __name__ == "__main__":
    run_stage("tokenise", main)
