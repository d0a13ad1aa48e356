"""The tokenise stage against `tokenizers` alone: encode_batch on the same text, which is in memory already.

The stage does more: it reads the corpus, deals documents to splits by their hashes, writes shards and hashes those.
Both have the same tokenizer, trained before, and as many threads, for both run in this process.
"""

import json
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path

from benchmarks.default_corpus import default_corpus
from benchmarks.measure import Result, alternately, median_ratio, medians
from calm_core.corpus.documents import documents
from calm_core.corpus.tokenise import tokenise
from calm_core.params import CorpusParams, Params, load_params
from calm_core.tokens.batch_encoding import BATCH_CHARACTERS
from calm_core.tokens.tokenizer import load_tokenizer

ROUNDS = 5


def tokenising() -> list[Result]:
    """The default corpus, read from botocore's files and from a .jsonl file."""
    with default_corpus(load_params()) as corpus:
        texts = list(documents(corpus.params.corpus))
        lines = corpus.folder / "corpus.jsonl"
        lines.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
        scratch = corpus.folder / "scratch"
        scratch.mkdir()
        alone = partial(_encode_batches, Path(corpus.params.tokenizer.path), texts)
        of_files = {"source": "files", "paths": [str(lines)], "text_field": "text"}
        sources = {
            "the default corpus": corpus.params.corpus,
            "a .jsonl file": corpus.params.corpus.model_copy(update=of_files),
        }
        return [
            _compared(f"tokenise stage, {name}", alone, partial(_stage, corpus.params, source, scratch), texts)
            for name, source in sources.items()
        ]


def _compared(name: str, alone: Callable[[], object], stage: Callable[[], object], texts: list[str]) -> Result:
    pairs = alternately(alone, stage, ROUNDS)
    alone_seconds, seconds = medians(pairs)
    bytes_ = sum(len(text.encode()) for text in texts)
    details = {
        "documents": len(texts),
        "bytes": bytes_,
        "bytes_per_second": bytes_ / seconds,
        "encode_batch_bytes_per_second": bytes_ / alone_seconds,
    }
    return Result(name, "encode_batch of `tokenizers` alone", median_ratio(pairs), "of its rate", ">=", 0.8, details)


def _stage(params: Params, corpus: CorpusParams, folder: Path) -> None:
    with redirect_stderr(StringIO()):
        tokenise(params.model_copy(update={"corpus": corpus}), folder)


def _encode_batches(tokenizer_path: Path, texts: list[str]) -> None:
    """Encode ``texts`` in pieces of as many characters as the stage takes together, and keep nothing."""
    tokenizer = load_tokenizer(tokenizer_path)
    ends, characters = [0], 0
    for index, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or index == len(texts):
            ends.append(index)
            characters = 0
    for start, end in pairwise(ends):
        tokenizer.encode_batch(texts[start:end], add_special_tokens=False)
