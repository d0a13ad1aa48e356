"""From documents to token shards in bounded memory: train the tokenizer on a sample, then encode in batches.

Encoding commits its work in stretches: the documents up to the one that fills a shard of either split. The shards of a
finished stretch are kept with a record of where in the corpus the next one begins, so a killed process loses no more
than one stretch.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from calm_core.corpus.documents import Documents, Mark, Place, describe, is_validation
from calm_core.corpus.plain_text import count_units
from calm_core.corpus.text_files import file_format, source_files
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params
from calm_core.runtime.progress import progress
from calm_core.storage.json_io import write_json
from calm_core.storage.provenance import DESCRIPTION
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.batch_encoding import encode_documents
from calm_core.tokens.blocks import require_block
from calm_core.tokens.round_trip import told_changes, told_losses
from calm_core.tokens.shards import TokenWriter
from calm_core.tokens.tokenizer import (
    TOKENIZER,
    end_of_text_id,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
    vocabulary_size_of,
)

SPLITS = ("train", "validation")

MOST_COUNTED = 100_000
"""Lines that are counted for a message."""


def tokenise(params: Params, folder: Path, kept: FinishedFiles | None = None) -> dict[str, Any]:
    """Write tokenizer.json, the shards of both splits and description.json into ``folder``; returns the description.

    Resumes from what an interrupted call with the same corpus and params left in ``kept``; the result is the same,
    byte for byte.

    Raises:
        CalmError: the corpus cannot be read, leaves a split without a document, or has too few held-out tokens for
            one block of evaluation.
    """
    _require_several_documents(params.corpus)
    if kept is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return tokenise(params, folder, FinishedFiles(Path(scratch), "tokenise"))
    digest = kept.find(TOKENIZER)
    done = _done(kept, digest)
    if digest is None:
        digest, texts = _make_tokenizer(params, kept)
    else:
        shards = sum(len(names) for names in done.sha256.values())
        what = f"{shards} shards, {done.place.documents:,} documents" if shards else "the training of the tokenizer"
        kept.tell(f"goes on after {what}")
        documents = Documents(params.corpus, done.place)
        texts = _Texts(documents, iter(documents))
    tokenizer = parse_tokenizer(kept.read_bytes(TOKENIZER, digest), Path(TOKENIZER))
    done = _encode(tokenizer, digest, texts, done, params.corpus.validation_percent, kept)

    for split, counts in done.counts.items():
        if not counts.documents:
            number = sum(other.documents for other in done.counts.values())
            smaller = _smaller_units(params.corpus, source_files(params.corpus))
            raise CalmError(
                f"none of the corpus's {number:,} documents falls into the {split} split; use more, or another "
                f"corpus.validation_percent (now {params.corpus.validation_percent:g}){smaller}"
            )
    # Fails here and not in the evaluation, after all the training.
    context_tokens = max(params.calm.context_tokens, params.transformer.context_tokens)
    require_block(done.counts["validation"].tokens, context_tokens)
    files = {TOKENIZER: digest} | done.sha256["train"] | done.sha256["validation"]
    for name, sha256 in files.items():
        kept.put(name, sha256, folder)
    description = {
        **describe(params.corpus),
        "vocabulary_size": vocabulary_size_of(tokenizer),
        "end_of_text_id": end_of_text_id(tokenizer),
        "sha256": {TOKENIZER: digest},
        "splits": {split: {**done.counts[split]._asdict(), "sha256": done.sha256[split]} for split in SPLITS},
    }
    write_json(folder / DESCRIPTION, description)
    return description


def _require_several_documents(corpus: CorpusParams) -> None:
    """Raise CalmError if the corpus is one text file that is one document: a split would have none."""
    files = source_files(corpus)
    if len(files) == 1 and (smaller := _smaller_units(corpus, files)):
        raise CalmError(f"{files[0]} is one document, but both splits need text{smaller}")


def _smaller_units(corpus: CorpusParams, paths: list[Path]) -> str:
    """What to set so that the text files are more documents, with their numbers; "" where that does not help."""
    files = [path for path in paths if file_format(path) == "text"]
    if corpus.source != "files" or corpus.text_unit != "document" or not files:
        return ""
    units = count_units(files, MOST_COUNTED)
    if units["line"] <= len(files):
        return ""
    more = "or more " if units["line"] == MOST_COUNTED else ""
    told = [f"{unit} ({count:,} {more}documents)" for unit, count in units.items()]
    return f"; set corpus.text_unit to {' or '.join(told)}"


class _Counts(NamedTuple):
    """Totals of a split from the beginning of the corpus."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0


class _Done(NamedTuple):
    """The state of the work after so many ``stretches``."""

    stretches: int
    place: Place
    counts: dict[str, _Counts]
    sha256: dict[str, dict[str, str]]
    """Of each shard by its name, in each split."""


class _Texts(NamedTuple):
    """The documents to encode; ``source`` gives the place of each, to resume at."""

    source: Documents
    texts: Iterator[str]


def _done(kept: FinishedFiles, tokenizer_digest: str | None) -> _Done:
    """The state after the longest run of intact stretches, from the beginning, that this tokenizer encoded."""
    done = _Done(0, Place(), dict.fromkeys(SPLITS, _Counts()), {split: {} for split in SPLITS})
    while tokenizer_digest and (digest := kept.find(_record_name(done.stretches))):
        record = json.loads(kept.read_bytes(_record_name(done.stretches), digest))
        shards = {name: sha256 for names in record["sha256"].values() for name, sha256 in names.items()}
        if record["tokenizer"] != tokenizer_digest or any(kept.find(name) != shards[name] for name in shards):
            break
        documents, mark = record["place"]
        done = _Done(
            done.stretches + 1,
            Place(documents, Mark(*mark)),
            {split: _Counts(**record["counts"][split]) for split in SPLITS},
            {split: done.sha256[split] | record["sha256"][split] for split in SPLITS},
        )
    return done


def _record_name(stretch: int) -> str:
    return f"stretch-{stretch:05d}.json"


def _make_tokenizer(params: Params, kept: FinishedFiles) -> tuple[str, _Texts]:
    """Train or load the tokenizer and keep it; returns its SHA-256, and all documents, those it read included."""
    documents, percent = Documents(params.corpus), params.corpus.validation_percent
    texts = iter(documents)
    if params.tokenizer.path:
        tokenizer = load_tokenizer(Path(params.tokenizer.path))
        if (size := vocabulary_size_of(tokenizer)) != params.tokenizer.vocabulary_size:
            raise CalmError(
                f"{params.tokenizer.path} has {size} entries but tokenizer.vocabulary_size is "
                f"{params.tokenizer.vocabulary_size}; set it to {size}, the largest id + 1"
            )
        if told := told_losses(tokenizer):
            kept.tell(f"{params.tokenizer.path}: {told}")
    else:
        # The sample is read once and kept: reading a remote stream again would be slow.
        beginning = _beginning(texts, params.tokenizer.training_megabytes * 10**6, percent)
        sample = (text for text in beginning if not is_validation(text, percent))
        with progress("tokenizer training", None, "documents") as advance:
            tokenizer = train_tokenizer(_counted(sample, advance), params.tokenizer.vocabulary_size)
        texts = _emptied(beginning, texts)
    with kept.scratch() as scratch:
        tokenizer.save(str(scratch / TOKENIZER))
        return kept.keep(scratch / TOKENIZER), _Texts(documents, texts)


def _encode(
    tokenizer: Tokenizer,
    tokenizer_digest: str,
    texts: _Texts,
    done: _Done,
    validation_percent: float,
    kept: FinishedFiles,
) -> _Done:
    """Encode ``texts``, the documents after ``done``, and keep them stretch by stretch."""
    documents = done.place.documents
    with kept.scratch() as scratch, progress("tokenise", None, "documents", documents) as advance:
        splits = _SplitWriters(scratch, vocabulary_size_of(tokenizer), done)
        for batch in encode_documents(tokenizer, texts.texts):
            if not documents and (told := told_changes(tokenizer, batch.texts)):
                kept.tell(told)
            held_out = np.array([is_validation(text, validation_percent) for text in batch.texts])
            characters = np.array([len(text) for text in batch.texts])
            # A batch may hold the ends of several stretches.
            rest = _SplitDocuments(batch.token_ids, batch.lengths, characters, held_out)
            while len(rest.lengths):
                count, filled = splits.documents_of_stretch(rest)
                splits.write(rest.first(count))
                documents += count
                if filled:
                    done = _keep_stretch(splits, texts.source.place(documents), done, tokenizer_digest, kept, scratch)
                advance(count)
                rest = rest.after(count)
        if documents > done.place.documents:
            done = _keep_stretch(splits, texts.source.place(documents), done, tokenizer_digest, kept, scratch)
    return done


def _keep_stretch(
    splits: "_SplitWriters", place: Place, done: _Done, tokenizer_digest: str, kept: FinishedFiles, scratch: Path
) -> _Done:
    """End the stretch before ``place``: keep its shards and the record of them."""
    sha256 = {split: {path.name: kept.keep(path) for path in paths} for split, paths in splits.finish().items()}
    counts = splits.counts()
    record = {
        "tokenizer": tokenizer_digest,
        "place": place,
        "counts": {split: counts[split]._asdict() for split in SPLITS},
        "sha256": sha256,
    }
    # The record is the commit: written last, after all that it names.
    path = scratch / _record_name(done.stretches)
    write_json(path, record)
    kept.keep(path)
    return _Done(done.stretches + 1, place, counts, {split: done.sha256[split] | sha256[split] for split in SPLITS})


class _SplitDocuments(NamedTuple):
    """Documents and their splits: ``token_ids`` concatenated, the other columns with one entry a document."""

    token_ids: np.ndarray
    lengths: np.ndarray
    characters: np.ndarray
    held_out: np.ndarray

    def first(self, count: int) -> "_SplitDocuments":
        """The first ``count`` documents."""
        tokens = int(self.lengths[:count].sum())
        return _SplitDocuments(self.token_ids[:tokens], *(column[:count] for column in self[1:]))

    def after(self, count: int) -> "_SplitDocuments":
        """All but the first ``count`` documents."""
        tokens = int(self.lengths[:count].sum())
        return _SplitDocuments(self.token_ids[tokens:], *(column[count:] for column in self[1:]))

    def of(self, split: str) -> np.ndarray:
        """Which documents go to ``split``, [documents] bool."""
        return self.held_out if split == "validation" else ~self.held_out


class _SplitWriters:
    """The open shards of both splits, which continue after ``done``."""

    def __init__(self, folder: Path, vocabulary_size: int, done: _Done) -> None:
        self._writers: dict[str, TokenWriter] = {}
        for split in SPLITS:
            shards, counts = len(done.sha256[split]), done.counts[split]
            self._writers[split] = TokenWriter(folder, split, vocabulary_size, shards, counts.documents, counts.tokens)
        self._characters = {split: done.counts[split].characters for split in SPLITS}

    def documents_of_stretch(self, documents: _SplitDocuments) -> tuple[int, bool]:
        """How many of ``documents`` belong to this stretch, and whether it ends there, as the last fills a shard."""
        # The first document, in either split, at which that split's running sum of tokens reaches what its shard has
        # left.
        filling = min(
            int(np.searchsorted(np.cumsum(documents.lengths * documents.of(split)), writer.room))
            for split, writer in self._writers.items()
        )
        filled = filling < len(documents.lengths)
        return filling + filled, filled

    def write(self, documents: _SplitDocuments) -> None:
        """Add ``documents``, each to its split."""
        for split, writer in self._writers.items():
            here = documents.of(split)
            of_split = np.repeat(here, documents.lengths)
            writer.write_documents(documents.token_ids[of_split], documents.lengths[here])
            self._characters[split] += int(documents.characters[here].sum())

    def finish(self) -> dict[str, list[Path]]:
        """End the shards of both splits, full or not; returns the new ones of each, none where it got no document."""
        finished: dict[str, list[Path]] = {}
        for split, writer in self._writers.items():
            writer.flush()
            finished[split], writer.paths = writer.paths, []
        return finished

    def counts(self) -> dict[str, _Counts]:
        """Of each split, from the beginning of the corpus on."""
        return {
            split: _Counts(writer.documents, self._characters[split], writer.tokens)
            for split, writer in self._writers.items()
        }


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


def _emptied(beginning: list[str], texts: Iterator[str]) -> Iterator[str]:
    """First the texts of ``beginning``, each freed once it is yielded, then ``texts``."""
    # Reversed, so that pop() takes the first in constant time and frees it.
    beginning.reverse()
    while beginning:
        yield beginning.pop()
    yield from texts


def _counted(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        yield text
        advance()
