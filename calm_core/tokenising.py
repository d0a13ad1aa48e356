"""From documents to token shards in bounded memory: train the tokenizer on a sample, then encode in batches."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from calm_core.artefacts import sha256, write_json
from calm_core.corpus import describe, documents, is_validation
from calm_core.errors import CalmError
from calm_core.evaluation_blocks import require_block
from calm_core.params import Params
from calm_core.progress import progress
from calm_core.token_files import DESCRIPTION, TokenWriter
from calm_core.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer

BATCH_DOCUMENTS = 4096


def tokenise(params: Params, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json, the shards of both splits and description.json into ``folder``; returns the description.

    Raises:
        CalmError: the corpus cannot be read, leaves a split without a document, or has too few held-out tokens for
            one block of evaluation.
    """
    corpus, validation_percent = params.corpus, params.corpus.validation_percent
    if params.tokenizer.path:
        tokenizer = load_tokenizer(Path(params.tokenizer.path))
        if (size := tokenizer.get_vocab_size()) != params.tokenizer.vocabulary_size:
            raise CalmError(
                f"{params.tokenizer.path} has {size} entries but tokenizer.vocabulary_size is "
                f"{params.tokenizer.vocabulary_size}; set it to {size}"
            )
    else:
        texts = (text for text in documents(corpus) if not is_validation(text, validation_percent))
        sample = _first_bytes(texts, params.tokenizer.training_megabytes * 10**6)
        with progress("tokenizer training", None, "documents") as advance:
            tokenizer = train_tokenizer(_counted(sample, advance), params.tokenizer.vocabulary_size)
    tokenizer.save(str(folder / "tokenizer.json"))

    vocabulary_size, end_of_text = tokenizer.get_vocab_size(), end_of_text_id(tokenizer)
    writers = {split: TokenWriter(folder, split, vocabulary_size) for split in ("train", "validation")}
    characters = dict.fromkeys(writers, 0)
    stream = documents(corpus)
    with progress("tokenise", None, "documents") as advance:
        while batch := list(islice(stream, BATCH_DOCUMENTS)):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                split = "validation" if is_validation(text, validation_percent) else "train"
                writers[split].write([*encoding.ids, end_of_text])
                characters[split] += len(text)
            advance(len(batch))
    for split, writer in writers.items():
        writer.flush()
        if not writer.documents:
            raise CalmError(
                f"no document of the corpus falls into the {split} split; use more documents or another "
                f"corpus.validation_percent (now {validation_percent:g})"
            )
    # Told now, not by the evaluation after all the training.
    require_block(writers["validation"].tokens, max(params.calm.context_tokens, params.transformer.context_tokens))
    description = {
        **describe(corpus),
        "vocabulary_size": vocabulary_size,
        "end_of_text_id": end_of_text,
        "splits": {
            split: {
                "documents": writer.documents,
                "characters": characters[split],
                "tokens": writer.tokens,
                "sha256": {path.name: sha256(path) for path in writer.paths},
            }
            for split, writer in writers.items()
        },
    }
    write_json(folder / DESCRIPTION, description)
    return description


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Texts until their UTF-8 reaches ``limit`` bytes."""
    total = 0
    for text in texts:
        if total >= limit:
            return
        total += len(text.encode())
        yield text


def _counted(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        yield text
        advance()
