"""Which split a document goes to: by its text, its file, a field of its row or its service."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from calm_core.corpus import tokenise as tokenising
from calm_core.corpus.documents import Documents
from calm_core.corpus.splits import SPLITS, group_of, split_of
from calm_core.corpus.tokenise import tokenise
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import load_tokenizer
from tests.calm_core.corpus.test_documents import dataset, files


def groups(corpus: CorpusParams) -> list[tuple[str, str]]:
    return [tuple(document) for document in Documents(corpus)]


def test_splits_have_their_shares_and_nothing_moves_between_held_out_ones() -> None:
    names = [f"group {number}" for number in range(20_000)]
    found = {name: split_of(name, 5.0, 10.0) for name in names}
    shares = Counter(found.values())
    assert set(shares) == set(SPLITS)
    # Five standard deviations of a binomial.
    assert abs(shares["validation"] - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(shares["test"] - 2000) < 5 * (20_000 * 0.10 * 0.90) ** 0.5
    for percents in ((5.0, 30.0), (30.0, 10.0), (30.0, 30.0)):
        for name, split in found.items():
            assert split == "train" or split_of(name, *percents) == split
    for name, split in found.items():  # and from them to training alone
        assert split_of(name, 2.0, 10.0) in (split, "train" if split == "validation" else split)


def test_the_split_of_a_text_is_what_it_was() -> None:
    # SHA-256 of "abc" begins with ba7816bf (FIPS 180-2), that is 0.72839 of all; of "a" with ca978112, 0.79137.
    assert [split_of("abc", 72.8, 27.1), split_of("abc", 72.9, 27.1)] == ["train", "validation"]
    assert [split_of("a", 1.0, 20.8), split_of("a", 1.0, 20.9)] == ["train", "test"]


def test_a_group_is_in_one_split(tmp_path: Path, smoke: Params) -> None:
    texts = [f"Text number {number} of several, with some words." for number in range(300)]
    rows = [{"text": text, "site": f"site {number % 30}"} for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes: dict[str, Any] = {"split_by": "site", "validation_percent": 30.0, "test_percent": 30.0}
    corpus = files(smoke, tmp_path / "a.jsonl", deduplicate=False, **changes)
    (tmp_path / "tokens").mkdir()
    tokenise(smoke.model_copy(update={"corpus": corpus}), tmp_path / "tokens")
    tokenizer = load_tokenizer(tmp_path / "tokens")
    for split in SPLITS:
        stream = TokenStream(tmp_path / "tokens", split)
        written = tokenizer.decode(stream.slice(0, len(stream)).tolist(), skip_special_tokens=False).split("<eos>")
        expected = [row["text"] for row in rows if split_of(row["site"], 30.0, 30.0) == split]
        assert written == [*expected, ""]
        assert len(expected) % 10 == 0


def test_by_document_the_group_is_the_text(tmp_path: Path, params: Params) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none")
    expected = [("one", "one"), ("two", "two"), ("one", "one")]
    for unit in ("auto", "document"):
        assert groups(files(params, tmp_path, text_unit="line", split_by=unit)) == expected


def test_botocore_by_service_unless_told_otherwise(params: Params) -> None:
    first = params.corpus.model_copy(update={"documents": 900})
    named = groups(first)
    services = list(dict.fromkeys(group for _, group in named))
    assert services[0] == "accessanalyzer"
    assert services == sorted(services)
    assert len(services) > 1
    assert groups(first.model_copy(update={"split_by": "service"})) == named
    assert groups(first.model_copy(update={"split_by": "document"})) == [(text, text) for text, _ in named]


def test_by_file_a_moved_folder_changes_nothing(tmp_path: Path, params: Params) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "more/b.jsonl").write_text('{"text": "three"}\n')
    pl.DataFrame({"text": ["four"]}).write_parquet(folder / "more/c.parquet")
    changes: dict[str, Any] = {"text_unit": "line", "split_by": "file"}
    expected = [("one", "a.txt"), ("two", "a.txt"), ("three", "more/b.jsonl"), ("four", "more/c.parquet")]
    assert groups(files(params, folder, **changes)) == expected
    assert groups(files(params, folder / "**/*", **changes)) == expected
    assert groups(files(params, folder / "more/*", **changes)) == [("three", "b.jsonl"), ("four", "c.parquet")]
    assert groups(files(params, folder / "a.txt", folder / "more", **changes))[2:] == [
        ("three", "b.jsonl"),
        ("four", "c.parquet"),
    ]
    shutil.move(folder, tmp_path / "moved")
    assert groups(files(params, tmp_path / "moved", **changes)) == expected


VALUES = ["x", "x", "é"]


def written(folder: Path, kind: str, columns: dict[str, list[Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pl.DataFrame(columns, strict=False).write_parquet(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("source", ["files", "huggingface"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_by_a_field_in_every_format(tmp_path: Path, params: Params, source: str, kind: str) -> None:
    def corpus(columns: dict[str, list[Any]], field: str) -> CorpusParams:
        path = written(tmp_path / "data", kind, columns)
        return (files if source == "files" else dataset)(
            params, path if source == "files" else path.parent, split_by=field
        )

    texts = ["one", "two", "", "three"]
    columns = {"id": [1, 1, 2, 30], "text": texts, "site": ["x", "x", None, "é"], "many": [["x"]] * 4}
    assert groups(corpus(columns, "site")) == [("one", "x"), ("two", "x"), ("three", "é")]
    # A number is the same in all formats.
    assert groups(corpus(columns, "id")) == [("one", "1"), ("two", "1"), ("three", "30")]
    assert groups(corpus(columns, "text")) == [("one", "one"), ("two", "two"), ("three", "three")]
    with pytest.raises(CalmError, match="has no field 'url'; corpus.split_by can be: document, id, text, site, many$"):
        groups(corpus(columns, "url"))
    with pytest.raises(
        CalmError, match="field 'many', which corpus.split_by names, holds a list; every row needs text"
    ):
        groups(corpus(columns, "many"))
    columns["site"] = ["x", None, "x", "é"]
    with pytest.raises(CalmError, match=r"(row|line|entry) 2: field 'site', which corpus.split_by names, holds null"):
        groups(corpus(columns, "site"))


def test_a_row_without_the_field(tmp_path: Path, params: Params) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "site": "x"}\n{"site": "y"}\n{"text": "two", "url": "u"}\n')
    told = r"a.jsonl, line 3 has no field 'site'; corpus.split_by can be: document, text, url$"
    with pytest.raises(CalmError, match=told):
        groups(files(params, tmp_path / "a.jsonl", split_by="site"))


def test_text_has_no_fields(tmp_path: Path, params: Params) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "site": "x"}\n')
    (tmp_path / "b.txt").write_text("two")
    told = r"b.txt is text and has no field 'site'; corpus.split_by can be: auto, document, file$"
    with pytest.raises(CalmError, match=told):
        next(iter(Documents(files(params, tmp_path, split_by="site"))))


def test_values_that_are_no_groups_and_those_that_are() -> None:
    values = [1, 1.0, True, "True", 1.5, float("nan"), float("inf"), 1e300]
    found = [group_of(value, "row 1", "x") for value in values]
    assert found[:7] == ["1", "1", "true", "True", "1.5", "nan", "inf"]
    assert found[7] == str(int(1e300))
    for value in (None, [], {}, b""):
        with pytest.raises(CalmError, match="row 1: field 'x', which corpus.split_by names, holds"):
            group_of(value, "row 1", "x")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"split_by": "file"},
            "split_by is 'file' but source is botocore, which can be split by: auto, document, serv",
        ),
        ({"split_by": "text"}, "which can be split by: auto, document, service"),
        ({"source": "huggingface", "dataset": "x", "split_by": "file"}, "auto, document, or the name of a field"),
        ({"split_by": ""}, "at least 1 character"),
        ({"validation_percent": 60.0, "test_percent": 40.0}, "60 and test_percent 40 leave nothing to train on"),
        ({"test_percent": 0.0}, "greater than 0"),
    ],
)
def test_params_that_contradict_each_other(params: Params, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CorpusParams.model_validate({**params.corpus.model_dump(), **changes})


def test_a_split_that_gets_nothing_says_what_to_set(tmp_path: Path, smoke: Params) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number}.")
    changes: dict[str, Any] = {"validation_percent": 2.5, "test_percent": 2.5}
    (tmp_path / "tokens").mkdir()

    def told(**more: Any) -> str:
        corpus = files(smoke, tmp_path / "*.txt", **{**changes, **more})
        with pytest.raises(CalmError) as raised:
            tokenise(smoke.model_copy(update={"corpus": corpus}), tmp_path / "tokens")
        return str(raised.value)

    percents = "(corpus.validation_percent {}, corpus.test_percent {}); "
    begin = "none of the corpus's 20 documents falls into the {} split " + percents
    assert told() == begin.format("validation", 2.5, 2.5) + "use more text or larger percents, 20 each for so few"
    assert told(split_by="file") == (
        begin.format("validation", 2.5, 2.5)
        + "use more text or larger percents, or corpus.split_by: document (now a file is in one split as a whole)"
    )
    assert told(validation_percent=50.0, test_percent=49.9) == begin.format("train", 50, 49.9) + (
        "use more text or smaller percents"
    )
    # And what it says helps so far that only the length of the texts is wrong.
    assert told(validation_percent=20.0, test_percent=20.0).startswith("the validation split has ")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "file"])
def test_a_stream_goes_on_with_its_groups(
    tmp_path: Path, params: Params, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.corpus.documents.MARK_DOCUMENTS", 10)
    monkeypatch.setattr("calm_core.corpus.parquet_rows.BATCH_ROWS", 30)
    texts = [f"text {number}" for number in range(300)]
    columns = {"text": texts, "site": [f"site {number // 3}" for number in range(300)]}
    for part in ("a", "b"):
        path = written(tmp_path / part, "jsonl" if kind == "file" else kind, columns)
        if path.suffix == ".parquet":
            pl.read_parquet(path).write_parquet(path, row_group_size=70)
    corpus = files(params, tmp_path, split_by="file" if kind == "file" else "site")
    stream = Documents(corpus)
    documents = list(stream)
    expected = ["a/a.jsonl"] * 300 + ["b/a.jsonl"] * 300 if kind == "file" else columns["site"] * 2
    assert documents == list(zip(texts * 2, expected, strict=True))
    for number in (0, 95, 299, 431, 600):
        assert list(Documents(corpus, stream.place(number))) == documents[number:]


def test_the_tokenizer_learns_from_as_much_of_training_as_asked_for(
    tmp_path: Path, smoke: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No held-out document is in the sample, and none counts towards its size."""
    texts = [f"{number} " + "x" * 9_990 for number in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = files(smoke, tmp_path / "a.jsonl", deduplicate=False, validation_percent=40.0, test_percent=10.0)
    learned: list[str] = []
    original = tokenising.train_tokenizer
    monkeypatch.setattr(
        tokenising,
        "train_tokenizer",
        lambda sample, size: original((learned.append(text) or text for text in sample), size),
    )
    (tmp_path / "tokens").mkdir()
    section = smoke.tokenizer.model_copy(update={"vocabulary_size": 260, "training_megabytes": 1})
    tokenise(smoke.model_copy(update={"corpus": corpus, "tokenizer": section}), tmp_path / "tokens")
    train = [text for text in texts if split_of(text, 40.0, 10.0) == "train"]
    assert learned == train[: len(learned)]
    assert sum(map(len, learned[:-1])) < 10**6 <= sum(map(len, learned))
