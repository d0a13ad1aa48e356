"""Stage tokenise: the corpus -> data/tokens, and data/groups.parquet: which held-out documents belong together."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from calm_core.corpus.digest import corpus_digest
from calm_core.corpus.tokenise import tokenise
from calm_core.params import Params
from calm_core.storage.atomic import whole_directory
from calm_core.storage.resumable import FinishedFiles
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import CHECKPOINTS, run_stage
from stages.runner.users_tree import in_users_tree


def main(params: Params) -> None:
    """Write tokenizer, token shards and their description."""
    kept = FinishedFiles(folder_of("tokenise", params, _inputs(params)).absolute(), "tokenise")
    groups = Path("data/groups.parquet").absolute()
    with whole_directory(Path("data/tokens").absolute()) as folder, in_users_tree():
        splits = tokenise(params, folder, kept, groups)["splits"]
    mark_finished(kept.folder)
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens{_seen(counts)}")


def _seen(counts: dict[str, Any]) -> str:
    """What training has seen of a held-out split, to put behind its size."""
    if (seen := counts.get("seen_in_training")) is None:
        return ""
    length, before, after = seen["ngram_tokens"], seen["ngram_share_before"], seen["ngram_share_after"]
    mostly, dropped = seen["document_share_before"], seen["documents_dropped"]
    left = f"; {dropped:,} dropped, {100 * after:.1f} % of the {length}-grams of the others are" if dropped else ""
    return (
        f"; {100 * before:.1f} % of its {length}-grams are in training, and more than half of those of "
        f"{100 * mostly:.1f} % of its documents{left}"
    )


def _inputs(params: Params) -> dict[str, Any]:
    """Inputs that dvc.yaml does not name: the text as it is now, also in a run by hand, and what reads it."""
    with in_users_tree():
        text = corpus_digest(params, CHECKPOINTS)
    return {
        "text": text,
        "libraries": {name: version(name) for name in ("datasets", "tokenizers")},
    }


if __name__ == "__main__":
    run_stage("tokenise", main)
