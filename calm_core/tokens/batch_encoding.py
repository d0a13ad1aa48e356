"""Texts to token ids in batches, pipelined: one batch is encoded, without the GIL, while Python reads the next."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from calm_core.tokens.document_marks import DocumentMarks, end_of_text_marks
from calm_core.tokens.tokenizer import encode_texts

BATCH_DOCUMENTS = 4096
BATCH_CHARACTERS = 1 << 20
"""Limits of a batch, whichever is reached first. A token takes some hundred bytes while it is being encoded."""


class EncodedDocuments(NamedTuple):
    """Consecutive documents: their texts, their concatenated token ids, and the number of tokens of each."""

    texts: list[str]
    token_ids: np.ndarray
    lengths: np.ndarray

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each document with its token ids."""
        return zip(self.texts, np.split(self.token_ids, self.lengths.cumsum()[:-1]), strict=True)


def encode_documents(
    tokenizer: Tokenizer, texts: Iterator[str], marks: DocumentMarks | None = None
) -> Iterator[EncodedDocuments]:
    """All of ``texts`` in batches, with their token ids, ``marks`` around each document: by default, an end of text.

    While a batch is encoded, without the GIL, the next one is read and the caller uses the one before.

    Raises:
        CalmError: a text cannot be encoded.
    """
    around = marks or end_of_text_marks(tokenizer)

    # One thread: the tokenizer has threads of its own, and batches have to stay in order.
    with ThreadPoolExecutor(max_workers=1) as encoder:
        running: tuple[list[str], Future[list[Encoding]]] | None = None
        for batch in _batches(texts):
            before, running = running, (batch, encoder.submit(encode_texts, tokenizer, batch))
            if before:
                yield _gathered(before[0], before[1].result(), around)
                # While the generator is suspended, the texts of the batch would stay in memory.
                del before
        if running:
            yield _gathered(running[0], running[1].result(), around)


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


def _gathered(texts: list[str], encodings: list[Encoding], marks: DocumentMarks) -> EncodedDocuments:
    # One list for all: an array for each document costs twice as much where documents are short.
    token_ids: list[int] = []
    for encoding in encodings:
        token_ids += marks.before
        token_ids += encoding.ids
        token_ids += marks.after
    more = len(marks.before) + len(marks.after)
    lengths = np.array([len(encoding) + more for encoding in encodings])
    return EncodedDocuments(texts, np.fromiter(token_ids, np.int32, len(token_ids)), lengths)
