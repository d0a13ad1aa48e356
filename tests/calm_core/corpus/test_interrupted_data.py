"""Tokenising and encoding that were broken off go on with what is finished, and end with the same bytes."""

import gzip
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tokenizers import Tokenizer

from calm_core.corpus import documents as corpus_module
from calm_core.corpus import plain_text, rows, utf8
from calm_core.corpus import tokenise as tokenising
from calm_core.corpus.documents import Documents, Mark, Place
from calm_core.corpus.tokenise import tokenise
from calm_core.latents import encode as encoding
from calm_core.latents.encode import encode_corpus
from calm_core.params import CorpusParams, Params
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.document_marks import DocumentMarks
from tests.calm_core.corpus.test_file_rows import PACK
from tests.calm_core.tokens.test_tokens import autoencoder, small_corpus, stream_of


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def mixed_corpus(folder: Path, params: Params, **changes: Any) -> CorpusParams:
    """Files of each format, empty texts in between, whose tables of rows end anywhere."""
    draws = random.Random(0)
    texts = [f"Text {number} " + "words " * draws.randrange(20) for number in range(900)]
    texts[::7] = [" "] * len(texts[::7])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:300])
    (folder / "1.jsonl").write_text(lines, encoding="utf-8")
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(lines[: lines.rindex("\n", 0, 5000) + 1].encode()))
    (folder / "3.txt").write_text("\n".join(texts[300:500]), encoding="utf-8")
    (folder / "4.txt").write_text("\n".join(texts[500:550]), encoding="utf-8")
    pl.DataFrame({"text": texts[550:]}).write_parquet(folder / "5.parquet", row_group_size=50)
    changes = {"source": "files", "paths": [str(folder)], "text_unit": "line", "documents": None, **changes}
    return CorpusParams.model_validate({**params.corpus.model_dump(), **changes})


def restored(place: Place) -> Place:
    """``place`` after it was written as JSON and read again."""
    documents, mark = json.loads(json.dumps(place))
    return Place(documents, Mark(*mark))


@pytest.mark.parametrize("limit", [None, 500])
def test_a_stream_goes_on_from_any_document(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 40)
    monkeypatch.setattr(plain_text, "PIECE_BYTES", 1000)
    corpus = mixed_corpus(tmp_path, params, documents=limit)
    stream = Documents(corpus)
    texts = list(stream)
    assert len(texts) == limit or limit is None
    for number in range(0, len(texts) + 1, 71):
        place = restored(stream.place(number))
        assert number - place.mark.documents <= 40 + rows.BATCH_ROWS
        resumed = Documents(corpus, place)
        assert list(resumed) == texts[number:]
        if number % 3 == 0:  # and from there to the end once more
            later = (number + len(texts)) // 2
            assert list(Documents(corpus, restored(resumed.place(later)))) == texts[later:]


def test_rows_without_text_are_counted_from_the_beginning(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 40)
    corpus = mixed_corpus(tmp_path, params)
    stream = Documents(corpus)
    texts = list(stream)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "no text" in line]
    assert told.startswith(f"corpus: 103 of {len(texts) + 103} rows have no text")
    for number in (100, 400, 700, len(texts)):
        list(Documents(corpus, restored(stream.place(number))))
        assert told in capsys.readouterr().err


def test_files_that_are_done_are_not_opened_again(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 40)
    monkeypatch.setattr(plain_text, "PIECE_BYTES", 1000)
    corpus = mixed_corpus(tmp_path, params)
    stream = Documents(corpus)
    texts = list(stream)
    for name, number in (("1.jsonl", 340), ("2.jsonl.gz", 450), ("3.txt", 560), ("4.txt", 700)):
        (tmp_path / name).write_bytes(b"\xff no text")
        assert list(Documents(corpus, stream.place(number))) == texts[number:]


def test_files_of_one_document_each_that_are_done_are_not_opened_again(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 40)
    corpus = mixed_corpus(tmp_path, params, paths=[str(tmp_path / "books")], text_unit="document")
    (tmp_path / "books").mkdir()
    for number in range(100):
        (tmp_path / f"books/{number:03}.txt").write_text(f"Book {number}")
    stream = Documents(corpus)
    texts = list(stream)
    for number in range(80):
        (tmp_path / f"books/{number:03}.txt").write_bytes(b"\xff no text")
    assert list(Documents(corpus, restored(stream.place(90)))) == texts[90:]


@pytest.mark.parametrize("ending", PACK)
def test_a_stream_goes_on_inside_an_archive(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 40)
    monkeypatch.setattr(utf8, "PIECE_BYTES", 100)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(
        PACK[ending]("".join(json.dumps({"text": f"Text {number}"}) + "\n" for number in range(300)).encode())
    )
    corpus = mixed_corpus(tmp_path, params, paths=[str(path)])
    stream = Documents(corpus)
    texts = list(stream)
    place = restored(stream.place(290))
    assert place.mark.documents > 200
    assert list(Documents(corpus, place)) == texts[290:]


def test_botocore_goes_on(params: Params) -> None:
    corpus = params.corpus.model_copy(update={"documents": 300})
    stream = Documents(corpus)
    texts = list(stream)
    assert list(Documents(corpus, restored(stream.place(120)))) == texts[120:]


class BrokenOffError(Exception):
    pass


def break_off_after(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """The next call breaks off when it has finished that many files."""
    original, count = FinishedFiles.keep, itertools.count(1)

    def keep(self: FinishedFiles, path: Path) -> str:
        if next(count) > files:
            raise BrokenOffError
        return original(self, path)

    monkeypatch.setattr(FinishedFiles, "keep", keep)


@pytest.fixture()
def shards(tmp_path: Path, smoke: Params, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A corpus of some twenty small shards."""
    monkeypatch.setattr("calm_core.tokens.shards.SHARD_TOKENS", 700)
    monkeypatch.setattr("calm_core.tokens.batch_encoding.BATCH_DOCUMENTS", 64)
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 100)
    draws = random.Random(1)
    texts = [f"Text number {number} of several" + ", with words" * draws.randrange(5) for number in range(1000)]
    params = small_corpus(tmp_path, smoke, texts)
    return params.model_copy(update={"tokenizer": params.tokenizer.model_copy(update={"vocabulary_size": 300})})


def run(params: Params, folder: Path, kept: Path | None) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    tokenise(params, folder, None if kept is None else FinishedFiles(kept, "test"))
    return content(folder)


def test_tokenising_goes_on(
    tmp_path: Path, shards: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken off again and again after a few files, until it gets there: nothing that is finished is made twice."""
    whole = run(shards, tmp_path / "whole", None)
    files = len(whole) - 1
    assert len([name for name in whole if name.startswith("train-")]) > 10
    encoded: list[str] = []
    trained = 0
    original, train = tokenising.encode_documents, tokenising.train_tokenizer

    def encode_documents(tokenizer: Tokenizer, texts: Iterator[str], marks: DocumentMarks) -> Iterator[Any]:
        return original(tokenizer, (encoded.append(text) or text for text in texts), marks)

    def train_tokenizer(*arguments: Any) -> Tokenizer:
        nonlocal trained
        trained += 1
        return train(*arguments)

    monkeypatch.setattr(tokenising, "encode_documents", encode_documents)
    monkeypatch.setattr(tokenising, "train_tokenizer", train_tokenizer)
    lives, there = 0, False
    while not there:
        lives += 1
        encoded.clear()
        with monkeypatch.context() as context:
            # A shard of each split and a record are a stretch.
            break_off_after(context, 5)
            try:
                run(shards, tmp_path / "parts", tmp_path / "kept")
                there = True
            except BrokenOffError:
                assert not content(tmp_path / "parts")
        done = re.search(r"goes on after \d+ shards, ([\d,]+) documents", capsys.readouterr().err)
        assert (done is None) is (lives == 1)
        assert done is None or len(encoded) <= 1000 - int(done[1].replace(",", ""))
    assert lives > files / 5
    assert trained == 1
    assert content(tmp_path / "parts") == whole


def test_a_finished_corpus_is_not_encoded_again(
    tmp_path: Path, shards: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(shards, tmp_path / "first", tmp_path / "kept")
    monkeypatch.setattr("calm_core.tokens.batch_encoding.BATCH_DOCUMENTS", 33)
    break_off_after(monkeypatch, 0)
    assert run(shards, tmp_path / "second", tmp_path / "kept") == whole
    assert f"goes on after {len(whole) - 2} shards, 1,000 documents\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train-00003", "validation-00001", "stretch-00002", "tokenizer"])
def test_damage_is_told_of_and_made_good(
    tmp_path: Path, shards: Params, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = run(shards, tmp_path / "first", tmp_path / "kept")
    capsys.readouterr()
    (damaged,) = (tmp_path / "kept").glob(f"{name}-*")
    damaged.rename(tmp_path / damaged.name)  # what was put into a folder of outputs is the same file
    damaged.write_bytes((tmp_path / damaged.name).read_bytes())
    flip(damaged)
    assert run(shards, tmp_path / "second", tmp_path / "kept") == whole
    told = capsys.readouterr().err
    assert f"test: {damaged} is damaged; it is made again\n" in told
    assert ("goes on after" in told) is (name != "tokenizer")


def test_a_file_that_is_half_written_is_not_there(tmp_path: Path) -> None:
    kept = FinishedFiles(tmp_path, "test")
    with kept.scratch() as scratch:
        (scratch / "a.bin").write_bytes(b"half")
        assert kept.find("a.bin") is None
        digest = kept.keep(scratch / "a.bin")
    assert kept.find("a.bin") == digest
    assert not (tmp_path / ".new").exists()


def test_files_are_put_on_another_file_system_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = FinishedFiles(tmp_path / "kept", "test")
    with kept.scratch() as scratch:
        (scratch / "a.bin").write_bytes(b"whole")
        digest = kept.keep(scratch / "a.bin")

    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    kept.put("a.bin", digest, tmp_path)
    assert (tmp_path / "a.bin").stat().st_nlink == 2
    (tmp_path / "a.bin").unlink()
    monkeypatch.setattr("os.link", link)
    kept.put("a.bin", digest, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"whole"


def test_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(encoding, "SHARD_PATCHES", 16)
    tokens = stream_of(tmp_path, torch.randint(6, (900,), generator=torch.Generator().manual_seed(1)))
    made: list[int] = []
    original = encoding.posterior_shard

    def posterior_shard(shard: int, *rest: Any) -> Any:
        made.append(shard)
        return original(shard, *rest)

    def latents(name: str, kept: Path | None) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        finished = None if kept is None else FinishedFiles(kept, "test")
        counts = encode_corpus(autoencoder(), tokens, folder, "float32", finished)
        assert counts.patches == 300
        return content(folder)

    whole = latents("whole", None)
    shards = len(whole) - 1
    assert shards > 6
    monkeypatch.setattr(encoding, "posterior_shard", posterior_shard)
    with monkeypatch.context() as context:
        break_off_after(context, 3)
        with pytest.raises(BrokenOffError):
            latents("parts", tmp_path / "kept")
    assert made == [0, 1, 2, 3]
    made.clear()
    # Each is a piece of work of its own: any of them may be missing.
    (damaged,) = (tmp_path / "kept").glob("posteriors-00001-*")
    flip(damaged)
    capsys.readouterr()
    assert latents("parts", tmp_path / "kept") == whole
    assert made == [1, *range(3, shards)]
    told = capsys.readouterr().err
    assert f"test: {damaged} is damaged; it is made again\n" in told
    assert f"test: goes on after 2 of {shards} shards\n" in told
