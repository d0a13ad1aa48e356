"""From documents to token shards in bounded memory: train the tokenizer on a sample, encode in batches, decontaminate.

Encoding commits its work in stretches: the documents up to the one that fills a shard of any split. The shards of a
finished stretch are kept with a record of where in the corpus the next one begins, so a killed process loses no more
than one stretch. At the end the held-out splits are written anew without the documents that training has mostly seen.
"""

import json
import math
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from calm_core.corpus.decontamination import NGRAM_TOKENS, describe_seen, seen_in_training, write_documents
from calm_core.corpus.documents import Document, Documents, Mark, Place, describe
from calm_core.corpus.groups import write_groups
from calm_core.corpus.plain_text import count_units
from calm_core.corpus.splits import HELD_OUT, SPLITS, group_number, split_of, split_of_number
from calm_core.corpus.text_files import file_format, source_files
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params
from calm_core.runtime.progress import progress
from calm_core.storage.checksum import sha256
from calm_core.storage.json_io import write_json
from calm_core.storage.provenance import DESCRIPTION
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.batch_encoding import encode_documents
from calm_core.tokens.blocks import require_block
from calm_core.tokens.document_marks import DocumentMarks, document_marks
from calm_core.tokens.round_trip import told_changes, told_losses
from calm_core.tokens.shards import TokenStream, TokenWriter
from calm_core.tokens.tokenizer import (
    TOKENIZER,
    end_of_text_id,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
    vocabulary_size_of,
)

MOST_COUNTED = 100_000
"""Lines that are counted for a message."""


def tokenise(
    params: Params, folder: Path, kept: FinishedFiles | None = None, groups: Path | None = None
) -> dict[str, Any]:
    """Write tokenizer.json, the shards of all splits and description.json into ``folder``; returns the description.

    To ``groups``, if it is given, goes which group each held-out document is of (``groups.py``). Resumes from what an
    interrupted call with the same corpus and params left in ``kept``; the result is the same, byte for byte.

    Raises:
        CalmError: the corpus cannot be read, leaves a split without a document, or has too few tokens in a held-out
            split for one block of evaluation.
    """
    _require_several_documents(params.corpus)
    if kept is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return tokenise(params, folder, FinishedFiles(Path(scratch), "tokenise"), groups)
    digest = kept.find(TOKENIZER)
    done = _done(kept, digest)
    if digest is None:
        digest, texts = _make_tokenizer(params, kept)
    else:
        shards = sum(len(names) for names in done.sha256.values())
        what = f"{shards} shards, {done.place.documents:,} documents" if shards else "the training of the tokenizer"
        kept.tell(f"goes on after {what}")
        documents = Documents(params.corpus, done.place)
        texts = _Texts(documents, iter(documents), params.corpus)
    tokenizer = parse_tokenizer(kept.read_bytes(TOKENIZER, digest), Path(TOKENIZER))
    marks = document_marks(params.tokenizer.document_marks, tokenizer)
    done = _encode(tokenizer, digest, marks, texts, done, kept)
    _require_documents(params.corpus, done.counts)
    for name, of_file in ({TOKENIZER: digest} | done.sha256["train"]).items():
        kept.put(name, of_file, folder)
    held_out, of_documents = _put_held_out(params, done, vocabulary_size_of(tokenizer), kept, folder)
    kind = params.tokenizer.document_marks
    description = {
        **describe(params.corpus),
        "vocabulary_size": vocabulary_size_of(tokenizer),
        "end_of_text_id": end_of_text_id(tokenizer),
        # Named where it is another than that of earlier versions, as in a model's config.json.
        **({} if kind == "end_of_text" else {"document_marks": kind}),
        "sha256": {TOKENIZER: digest},
        "splits": {"train": {**done.counts["train"]._asdict(), "sha256": done.sha256["train"]}, **held_out},
    }
    write_json(folder / DESCRIPTION, description)
    if groups is not None:
        write_groups(groups, of_documents)
    return description


def _put_held_out(
    params: Params, done: "_Done", vocabulary_size: int, kept: FinishedFiles, folder: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Put the held-out splits beside training's in ``folder``; returns what the description says of each, and groups.

    Where ``corpus.deduplicate``, those of their documents are left out that training has mostly seen.
    """
    described: dict[str, dict[str, Any]] = {}
    groups: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for split in HELD_OUT:
            for name, digest in done.sha256[split].items():
                kept.put(name, digest, Path(scratch))
        streams = {split: TokenStream(Path(scratch), split) for split in HELD_OUT}
        for split, seen in seen_in_training(streams, TokenStream(folder, "train")).items():
            stays = ~seen.mostly | np.array(not params.corpus.deduplicate)
            lengths = np.diff(streams[split].document_ends.numpy(), prepend=0)
            counts = _require_block(params, split, done, lengths, stays)
            digests = done.sha256[split]
            if stays.all():
                for name, digest in digests.items():
                    kept.put(name, digest, folder)
            else:
                paths = write_documents(streams[split], stays, TokenWriter(folder, split, vocabulary_size))
                digests = {path.name: sha256(path) for path in paths}
            figures = describe_seen(seen, seen.of(stays))
            described[split] = {**counts._asdict(), "seen_in_training": figures, "sha256": digests}
            groups[split] = done.groups[split][stays]
    return described, groups


def _require_block(params: Params, split: str, done: "_Done", lengths: np.ndarray, stays: np.ndarray) -> "_Counts":
    """The counts of a held-out ``split`` of documents of ``lengths`` tokens, of which ``stays`` [documents] bool stay.

    Raises CalmError if that is too little: here and not in the evaluation, after all the training.
    """
    counts, dropped = done.counts[split], int((~stays).sum())
    tokens = counts.tokens - int(lengths[~stays].sum())
    why, remedy = "", f"a larger corpus.{split}_percent"
    if dropped:
        why = (
            f", since {dropped:,} of its {len(stays):,} documents were dropped, of whose {NGRAM_TOKENS}-grams training "
            "has more than half"
        )
        by_document = "" if params.corpus.split_unit == "document" else "corpus.split_by: document, "
        remedy += f", {by_document}corpus.deduplicate: false"
    context_tokens = max(params.calm.context_tokens, params.transformer.context_tokens)
    require_block(tokens, context_tokens, f"the {split} split", why, remedy)
    return _Counts(len(stays) - dropped, counts.characters - int(done.characters[split][~stays].sum()), tokens)


def _require_documents(corpus: CorpusParams, counts: dict[str, "_Counts"]) -> None:
    """Raise CalmError if a split has none."""
    empty = next((split for split in SPLITS if not counts[split].documents), None)
    if empty is None:
        return
    number = sum(of_split.documents for of_split in counts.values())
    percents = f"corpus.validation_percent {corpus.validation_percent:g}, corpus.test_percent {corpus.test_percent:g}"
    other = "smaller" if empty == "train" else "larger"
    remedy = f"use more text or {other} percents"
    if corpus.split_unit != "document":
        remedy += f", or corpus.split_by: document (now a {corpus.split_unit} is in one split as a whole)"
    elif empty != "train" and (enough := min(25, math.ceil(400 / number))) > getattr(corpus, f"{empty}_percent"):
        # Of so many per cent some four documents are expected: then a split has none in 1 case of 50.
        remedy += f", {enough} each for so few"
    smaller = _smaller_units(corpus, source_files(corpus))
    raise CalmError(
        f"none of the corpus's {number:,} documents falls into the {empty} split ({percents}); {remedy}{smaller}"
    )


def _require_several_documents(corpus: CorpusParams) -> None:
    """Raise CalmError if the corpus is one text file that is one document: a split would have none."""
    files = source_files(corpus)
    if len(files) == 1 and (smaller := _smaller_units(corpus, files)):
        raise CalmError(f"{files[0]} is one document, but all three splits need text{smaller}")


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
    characters: dict[str, np.ndarray]
    """Of each document of the held-out splits, [documents] int64."""
    groups: dict[str, np.ndarray]
    """``splits.group_number`` of each, [documents] uint64."""


class _Texts:
    """The texts of ``documents`` to encode, and their groups; ``source`` gives the place of each, to resume at."""

    def __init__(self, source: Documents, documents: Iterator[Document], corpus: CorpusParams) -> None:
        self.source = source
        self._documents, self._corpus = documents, corpus
        # Reading runs ahead of encoding by some batches.
        self._groups = deque[int]()

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self._groups.append(group_number(document.group))
            yield document.text

    def groups(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the groups of the next ``count`` texts, [count] uint64, and their splits, [count] uint8, as
        numbers of ``SPLITS``; each is told once."""
        numbers = [self._groups.popleft() for _ in range(count)]
        percents = self._corpus.validation_percent, self._corpus.test_percent
        splits = [SPLITS.index(split_of_number(number, *percents)) for number in numbers]
        return np.array(numbers, np.uint64), np.array(splits, np.uint8)


def _split(document: Document, corpus: CorpusParams) -> str:
    return split_of(document.group, corpus.validation_percent, corpus.test_percent)


def _done(kept: FinishedFiles, tokenizer_digest: str | None) -> _Done:
    """The state after the longest run of intact stretches, from the beginning, that this tokenizer encoded."""
    no_shards = {split: dict[str, str]() for split in SPLITS}
    no_characters = dict.fromkeys(HELD_OUT, np.empty(0, np.int64))
    no_groups = dict.fromkeys(HELD_OUT, np.empty(0, np.uint64))
    done = _Done(0, Place(), dict.fromkeys(SPLITS, _Counts()), no_shards, no_characters, no_groups)
    while tokenizer_digest and (digest := kept.find(_record_name(done.stretches))):
        record = json.loads(kept.read_bytes(_record_name(done.stretches), digest))
        shards = {name: digest for names in record["sha256"].values() for name, digest in names.items()}
        of_now = record["tokenizer"] == tokenizer_digest and "groups" in record  # which earlier code did not keep
        if not of_now or any(kept.find(name) != shards[name] for name in shards):
            break
        documents, mark = record["place"]
        done = _Done(
            done.stretches + 1,
            Place(documents, Mark(*mark)),
            {split: _Counts(**record["counts"][split]) for split in SPLITS},
            {split: done.sha256[split] | record["sha256"][split] for split in SPLITS},
            {
                split: np.append(done.characters[split], np.array(record["characters"][split], int))
                for split in HELD_OUT
            },
            {split: np.append(done.groups[split], np.array(record["groups"][split], np.uint64)) for split in HELD_OUT},
        )
    return done


def _record_name(stretch: int) -> str:
    return f"stretch-{stretch:05d}.json"


def _make_tokenizer(params: Params, kept: FinishedFiles) -> tuple[str, _Texts]:
    """Train or load the tokenizer and keep it; returns its SHA-256, and all documents, those it read included."""
    source = Documents(params.corpus)
    documents = iter(source)
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
        beginning = _beginning(documents, params.tokenizer.training_megabytes * 10**6, params.corpus)
        sample = (document.text for document in beginning if _split(document, params.corpus) == "train")
        with progress("tokenizer training", None, "documents") as advance:
            tokenizer = train_tokenizer(_counted(sample, advance), params.tokenizer.vocabulary_size)
        documents = _emptied(beginning, documents)
    with kept.scratch() as scratch:
        tokenizer.save(str(scratch / TOKENIZER))
        return kept.keep(scratch / TOKENIZER), _Texts(source, documents, params.corpus)


def _encode(
    tokenizer: Tokenizer, tokenizer_digest: str, marks: DocumentMarks, texts: _Texts, done: _Done, kept: FinishedFiles
) -> _Done:
    """Encode ``texts``, the documents after ``done``, with ``marks`` around each; keep them stretch by stretch."""
    documents = done.place.documents
    with kept.scratch() as scratch, progress("tokenise", None, "documents", documents) as advance:
        splits = _SplitWriters(scratch, vocabulary_size_of(tokenizer), done)
        for batch in encode_documents(tokenizer, iter(texts), marks):
            if not documents and (told := told_changes(tokenizer, batch.texts)):
                kept.tell(told)
            characters = np.array([len(text) for text in batch.texts])
            # A batch may hold the ends of several stretches.
            rest = _SplitDocuments(batch.token_ids, batch.lengths, characters, *texts.groups(len(batch.texts)))
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
    digests = {split: {path.name: kept.keep(path) for path in paths} for split, paths in splits.finish().items()}
    counts, (characters, groups) = splits.counts(), splits.of_documents()
    record = {
        "tokenizer": tokenizer_digest,
        "place": place,
        "counts": {split: counts[split]._asdict() for split in SPLITS},
        "sha256": digests,
        "characters": {split: characters[split].tolist() for split in HELD_OUT},
        "groups": {split: groups[split].tolist() for split in HELD_OUT},
    }
    # The record is the commit: written last, after all that it names.
    path = scratch / _record_name(done.stretches)
    write_json(path, record)
    kept.keep(path)
    return _Done(
        done.stretches + 1,
        place,
        counts,
        {split: done.sha256[split] | digests[split] for split in SPLITS},
        {split: np.append(done.characters[split], characters[split]) for split in HELD_OUT},
        {split: np.append(done.groups[split], groups[split]) for split in HELD_OUT},
    )


class _SplitDocuments(NamedTuple):
    """Documents and their splits: ``token_ids`` concatenated, the other columns with one entry a document."""

    token_ids: np.ndarray
    lengths: np.ndarray
    characters: np.ndarray
    groups: np.ndarray
    splits: np.ndarray
    """As numbers of ``SPLITS``."""

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
        return self.splits == SPLITS.index(split)


class _SplitWriters:
    """The open shards of all splits, which continue after ``done``."""

    def __init__(self, folder: Path, vocabulary_size: int, done: _Done) -> None:
        self._writers: dict[str, TokenWriter] = {}
        for split in SPLITS:
            shards, counts = len(done.sha256[split]), done.counts[split]
            self._writers[split] = TokenWriter(folder, split, vocabulary_size, shards, counts.documents, counts.tokens)
        self._characters = {split: done.counts[split].characters for split in SPLITS}
        self._of_documents = _nothing_yet()

    def documents_of_stretch(self, documents: _SplitDocuments) -> tuple[int, bool]:
        """How many of ``documents`` belong to this stretch, and whether it ends there, as the last fills a shard."""
        # The first document, in any split, at which that split's running sum of tokens reaches what its shard has
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
            if split in HELD_OUT:
                for column, values in zip(
                    self._of_documents[split], (documents.characters, documents.groups), strict=True
                ):
                    column.append(values[here])

    def finish(self) -> dict[str, list[Path]]:
        """End the shards of all splits, full or not; returns the new ones of each, none where it got no document."""
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

    def of_documents(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Characters, int64, and groups, uint64, of each document of the held-out splits since the last call."""
        of_documents, self._of_documents = self._of_documents, _nothing_yet()
        characters = {split: np.concatenate([np.empty(0, np.int64), *of[0]]) for split, of in of_documents.items()}
        groups = {split: np.concatenate([np.empty(0, np.uint64), *of[1]]) for split, of in of_documents.items()}
        return characters, groups


def _nothing_yet() -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Characters and groups of the documents of each held-out split: of none so far."""
    return {split: ([], []) for split in HELD_OUT}


def _beginning(documents: Iterator[Document], limit: int, corpus: CorpusParams) -> list[Document]:
    """The first of ``documents``, as far as their training split reaches ``limit`` bytes of UTF-8; reads no further."""
    beginning: list[Document] = []
    total = 0
    for document in documents:
        beginning.append(document)
        if _split(document, corpus) == "train":
            total += len(document.text.encode())
        if total >= limit:
            break
    return beginning


def _emptied(beginning: list[Document], documents: Iterator[Document]) -> Iterator[Document]:
    """First those of ``beginning``, each freed once it is yielded, then ``documents``."""
    # Reversed, so that pop() takes the first in constant time and frees it.
    beginning.reverse()
    while beginning:
        yield beginning.pop()
    yield from documents


def _counted(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        yield text
        advance()
