"""Stage tokenise: the corpus -> data/tokens."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from calm_core.corpus.text_files import source_files
from calm_core.corpus.tokenise import tokenise
from calm_core.params import Params
from calm_core.storage.atomic import whole_directory
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.tokenizer import tokenizer_file
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import run_stage


def main(params: Params) -> None:
    """Write tokenizer, token shards and their description."""
    kept = FinishedFiles(folder_of("tokenise", params, _inputs(params)), "tokenise")
    with whole_directory(Path("data/tokens")) as folder:
        splits = tokenise(params, folder, kept)["splits"]
    mark_finished(kept.folder)
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


def _inputs(params: Params) -> dict[str, Any]:
    """Inputs that DVC does not track: files that may change while the stage is interrupted, and reading libraries."""
    tokenizer = [tokenizer_file(Path(params.tokenizer.path))] if params.tokenizer.path else []
    # Size and time of change instead of a hash: a corpus may be large, and this runs before each start.
    files = [path for path in source_files(params.corpus) + tokenizer if path.is_file()]
    return {
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "libraries": {name: version(name) for name in ("datasets", "tokenizers")},
    }


if __name__ == "__main__":
    run_stage("tokenise", main)
