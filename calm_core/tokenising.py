"""From documents to token shards in bounded memory: train the tokenizer on a sample, then encode in batches."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

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
        for text, token_ids in encode_documents(tokenizer, texts):
            split = "validation" if is_validation(text, validation_percent) else "train"
            writers[split].write(token_ids)
            characters[split] += len(text)
            advance()
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


def encode_documents(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[tuple[str, list[int]]]:
    """Each of ``texts`` with its token ids, the end-of-text token after them."""
    end_of_text = end_of_text_id(tokenizer)
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            yield text, [*encoding.ids, end_of_text]


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
