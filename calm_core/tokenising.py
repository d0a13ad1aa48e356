"""From documents to token shards in bounded memory: train the tokenizer on a sample, then encode in batches."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from calm_core.artefacts import sha256, write_json
from calm_core.corpus import describe, documents, is_validation
from calm_core.errors import CalmError
from calm_core.evaluation_blocks import require_block
from calm_core.params import Params
from calm_core.progress import progress
from calm_core.token_files import DESCRIPTION, TokenWriter
from calm_core.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer

BATCH_DOCUMENTS = 4096
BATCH_CHARACTERS = 1 << 20
"""Where a batch ends, whichever is reached first. A token takes some hundred bytes while it is being encoded."""


def tokenise(params: Params, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json, the shards of both splits and description.json into ``folder``; returns the description.

    Raises:
        CalmError: the corpus cannot be read, leaves a split without a document, or has too few held-out tokens for
            one block of evaluation.
    """
    corpus, validation_percent = params.corpus, params.corpus.validation_percent
    texts = documents(corpus)
    if params.tokenizer.path:
        tokenizer = load_tokenizer(Path(params.tokenizer.path))
        if (size := tokenizer.get_vocab_size()) != params.tokenizer.vocabulary_size:
            raise CalmError(
                f"{params.tokenizer.path} has {size} entries but tokenizer.vocabulary_size is "
                f"{params.tokenizer.vocabulary_size}; set it to {size}"
            )
    else:
        beginning = _beginning(texts, params.tokenizer.training_megabytes * 10**6, validation_percent)
        sample = (text for text in beginning if not is_validation(text, validation_percent))
        with progress("tokenizer training", None, "documents") as advance:
            tokenizer = train_tokenizer(_counted(sample, advance), params.tokenizer.vocabulary_size)
        texts = chain(beginning, texts)
    tokenizer.save(str(folder / "tokenizer.json"))

    vocabulary_size, end_of_text = tokenizer.get_vocab_size(), end_of_text_id(tokenizer)
    writers = {split: TokenWriter(folder, split, vocabulary_size) for split in ("train", "validation")}
    characters = dict.fromkeys(writers, 0)
    with progress("tokenise", None, "documents") as advance:
        for batch in encode_documents(tokenizer, texts):
            held_out = np.array([is_validation(text, validation_percent) for text in batch.texts])
            sizes = np.array([len(text) for text in batch.texts])
            for split, mask in (("train", ~held_out), ("validation", held_out)):
                of_split = np.repeat(mask, batch.lengths)
                writers[split].write_documents(batch.token_ids[of_split], batch.lengths[mask])
                characters[split] += int(sizes[mask].sum())
            advance(len(batch.texts))
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
        "sha256": {"tokenizer.json": sha256(folder / "tokenizer.json")},
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


class EncodedDocuments(NamedTuple):
    """Some documents in a row: their texts, their token ids one after the other, and how many each has."""

    texts: list[str]
    token_ids: np.ndarray
    lengths: np.ndarray

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each document with its token ids."""
        return zip(self.texts, np.split(self.token_ids, self.lengths.cumsum()[:-1]), strict=True)


def encode_documents(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[EncodedDocuments]:
    """All of ``texts`` in batches, with their token ids, an end-of-text token after each document.

    While a batch is encoded, outside Python's lock, the next one is read and the last one is used.
    """
    end_of_text = end_of_text_id(tokenizer)

    def encode(batch: list[str]) -> list[Encoding]:
        return tokenizer.encode_batch_fast(batch, add_special_tokens=False)

    with ThreadPoolExecutor(max_workers=1) as encoder:
        running: tuple[list[str], Future[list[Encoding]]] | None = None
        for batch in _batches(texts):
            before, running = running, (batch, encoder.submit(encode, batch))
            if before:
                yield _gathered(before[0], before[1].result(), end_of_text)
                del before
        if running:
            yield _gathered(running[0], running[1].result(), end_of_text)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _gathered(texts: list[str], encodings: list[Encoding], end_of_text: int) -> EncodedDocuments:
    # One list for all: an array for each document costs twice as much where documents are short.
    token_ids: list[int] = []
    for encoding in encodings:
        token_ids += encoding.ids
        token_ids.append(end_of_text)
    lengths = np.array([len(encoding) + 1 for encoding in encodings])
    return EncodedDocuments(texts, np.fromiter(token_ids, np.int32, len(token_ids)), lengths)


def _beginning(texts: Iterator[str], limit: int, validation_percent: float) -> list[str]:
    """The first of ``texts``, as far as their training split reaches ``limit`` bytes of UTF-8; reads no further."""
    beginning: list[str] = []
    total = 0
    for text in texts:
        beginning.append(text)
        if not is_validation(text, validation_percent):
            total += len(text.encode())
        if total >= limit:
            break
    return beginning


def _counted(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        yield text
        advance()
