"""Every source of text, read as a user would give it, and every way in which it can be wrong."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import botocore
import datasets
import polars as pl
import pyarrow
import pyarrow.parquet
import pytest

from calm_core.corpus.botocore_docs import botocore_documents, plain_text
from calm_core.corpus.documents import Documents, documents
from calm_core.corpus.text_files import COMPRESSED
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
TEXTS = ["First document, ünïcode and all.", "Second.\nOf two lines.", "Third 🙂"]


def files(params: Params, *paths: Path, **changes: Any) -> CorpusParams:
    changes = {"source": "files", "paths": [str(path) for path in paths], **changes}
    return CorpusParams.model_validate({**params.corpus.model_dump(), **changes})


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()


def test_text_files_by_unit(tmp_path: Path, params: Params) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert list(documents(files(params, path))) == ["one\ntwo\n\nthree\n"]
    assert list(documents(files(params, path, text_unit="line"))) == ["one", "two", "three"]
    assert [text.strip() for text in documents(files(params, path, text_unit="paragraph"))] == ["one\ntwo", "three"]


@pytest.mark.parametrize("ending", ["", *COMPRESSED])
def test_json_lines_plain_and_compressed(ending: str, tmp_path: Path, params: Params) -> None:
    path = tmp_path / f"a.JSONL{ending.upper()}"
    path.write_bytes(PACK[ending](json_lines(TEXTS)))
    assert (path.read_bytes() == json_lines(TEXTS)) == (not ending)
    assert list(documents(files(params, path))) == TEXTS
    path.write_bytes(PACK[ending](json_lines(TEXTS) + b'{"text": "caf\xe9"}\n'))
    at = len(json_lines(TEXTS)) + 13
    with pytest.raises(CalmError, match=rf"a.JSONL{ending.upper()} is not UTF-8 text \(byte {at}, 0xe9 in line 4\)"):
        list(documents(files(params, path)))


def test_parquet(tmp_path: Path, params: Params) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"body": TEXTS}).write_parquet(path)
    assert list(documents(files(params, path, text_field="body"))) == TEXTS


def test_globs_and_folders_mix_formats_in_order(tmp_path: Path, params: Params) -> None:
    (tmp_path / "1.txt").write_text("from text", encoding="utf-8")
    (tmp_path / "2.jsonl").write_bytes(json_lines(["from json"]))
    (tmp_path / "3.txt").write_text("more text", encoding="utf-8")
    expected = ["from text", "from json", "more text"]
    assert list(documents(files(params, tmp_path))) == expected
    assert list(documents(files(params, tmp_path / "*"))) == expected
    assert list(documents(files(params, tmp_path, documents=2))) == expected[:2]


def test_dataset_folder_is_streamed(tmp_path: Path, params: Params) -> None:
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    datasets.Dataset.from_dict({"content": TEXTS}).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_dict({"content": ["held out"]}).to_parquet(folder / "test.parquet")
    changes = {"source": "huggingface", "dataset": str(folder), "text_field": "content"}
    corpus = CorpusParams.model_validate({**params.corpus.model_dump(), **changes})
    assert list(documents(corpus)) == TEXTS
    corpus = CorpusParams.model_validate({**params.corpus.model_dump(), **changes, "dataset_split": "test"})
    assert list(documents(corpus)) == ["held out"]
    corpus = CorpusParams.model_validate({**params.corpus.model_dump(), **changes, "dataset_split": "valid"})
    with pytest.raises(CalmError, match="cannot be opened"):
        list(documents(corpus))


def dataset(params: Params, folder: Path, **changes: Any) -> CorpusParams:
    changes = {"source": "huggingface", "dataset": str(folder), **changes}
    return CorpusParams.model_validate({**params.corpus.model_dump(), **changes})


def test_of_a_dataset_only_the_text_is_read(tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    parquet, lines = tmp_path / "parquet", tmp_path / "lines"
    parquet.mkdir()
    pl.DataFrame({"text": ["one", None], "id": [1, 2]}).write_parquet(parquet / "a.parquet")
    schema = pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
    with pyarrow.parquet.ParquetWriter(parquet / "b.parquet", schema) as writer:
        writer.write_table(schema.empty_table())  # a group of no rows
    pl.DataFrame({"url": ["u"], "id": ["x"], "text": ["two"]}).write_parquet(parquet / "c.parquet")
    assert list(documents(dataset(params, parquet))) == ["one", "two"]
    assert capsys.readouterr().err == "corpus: 1 of 3 rows have no text (null, absent or empty) and were skipped\n"
    with pytest.raises(CalmError, match="has no field 'body'; corpus.text_field can be: text, id$"):
        list(documents(dataset(params, parquet, text_field="body")))
    lines.mkdir()
    (lines / "a.jsonl").touch()
    scores = "".join(json.dumps({"text": "x", "score": 1 if number < 3999 else 0.5}) + "\n" for number in range(4000))
    (lines / "b.jsonl").write_text(scores)
    (lines / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "last", "late": {"a": []}}\n\n{"score": "high"}')
    assert list(documents(dataset(params, lines))) == ["x"] * 4000 + ["last"]
    with pytest.raises(CalmError, match="has no field 'body'; corpus.text_field can be: text, score, late$"):
        list(documents(dataset(params, lines, text_field="body")))
    with (lines / "c.jsonl").open("a") as file:
        file.write('\n{"text": ' + "[" * 100_000)
    with pytest.raises(CalmError, match="line 4004 nests too many levels"):
        list(documents(dataset(params, lines)))


def test_a_dataset_of_one_list(tmp_path: Path, params: Params) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert list(documents(dataset(params, tmp_path))) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_dataset_goes_on_from_any_row(
    tmp_path: Path, params: Params, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.corpus.documents.MARK_DOCUMENTS", 100)
    texts = [f"text {number}" for number in range(1000)]
    for part in range(2):
        table = pl.DataFrame({"text": texts[part * 500 : part * 500 + 500]})
        table.write_parquet(tmp_path / f"{part}.parquet") if kind == "parquet" else table.write_ndjson(
            tmp_path / f"{part}.jsonl"
        )
    stream = Documents(dataset(params, tmp_path))
    assert [document.text for document in stream] == texts
    for number in (0, 130, 499, 700, 1000):
        place = stream.place(number)
        assert number < 130 or place.mark.documents > number - 200
        assert [text for text, _ in Documents(dataset(params, tmp_path), place)] == texts[number:]


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl", "bad.jsonl.gz"])
def test_not_utf8(tmp_path: Path, params: Params, name: str) -> None:
    content = b'{"text": "caf\xe9"}\n'
    (tmp_path / "good.jsonl").write_bytes(json_lines(TEXTS))
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(CalmError, match=rf"{name} is not UTF-8 text \(byte 13, 0xe9 in line 1\)"):
        list(documents(files(params, path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b'{"text": "  "}\n', "holds no text"),
        ("a.pdf", b"%PDF", "unknown format; known endings: .txt"),
        ("a.jsonl", b'{"body": "x"}\n', "no field 'text'; corpus.text_field can be: body"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: field 'text' holds a number, not text"),
        ("a.jsonl", b"{not json\n", "cannot be read as json"),
        ("a.parquet", b"PAR1 but not really", "a.parquet cannot be read: Parquet magic bytes not found"),
        ("a.txt.gz", b"not gzip", "a.txt.gz cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS), mtime=0)[:-9],
            "a.jsonl.gz cannot be read: Compressed file ended",
        ),
        ("a.txt.xz", b"not xz at all", "a.txt.xz cannot be read: Input format not supported"),
        ("a.jsonl.bz2", b"not bz2", "a.jsonl.bz2 cannot be read: Invalid data stream"),
    ],
)
def test_files_without_text(tmp_path: Path, params: Params, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalmError, match=message) as raised:
        list(documents(files(params, tmp_path / name)))
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path, params: Params) -> None:
    with pytest.raises(CalmError, match="matches no file"):
        list(documents(files(params, tmp_path / "nothing.txt")))


def test_botocore_version_is_pinned(params: Params) -> None:
    corpus = params.corpus.model_copy(update={"botocore_version": "0.1"})
    with pytest.raises(CalmError, match="botocore_version is 0.1 but"):
        list(documents(corpus))


def test_botocore_models(tmp_path: Path) -> None:
    def model(service: str, version: str, *texts: str) -> None:
        folder = tmp_path / service / version
        folder.mkdir(parents=True)
        shapes = {f"Shape{number}": {"documentation": text} for number, text in enumerate(texts)}
        content = json.dumps({"documentation": f"<p>{service} {version}</p>", "shapes": shapes}).encode()
        (folder / "service-2.json.gz").write_bytes(gzip.compress(content))

    model("b", "2020-01-01", "old")
    model("b", "2021-01-01", "<p>new</p>", "<p>new</p>", "")
    model("a", "2019-01-01", "<p>new</p>")
    found = [(document["text"], document["service"]) for document in botocore_documents(tmp_path)]
    assert found == [("a 2019-01-01", "a"), ("new", "a"), ("b 2021-01-01", "b")]


def test_markup_is_removed() -> None:
    markup = "<p>The  <code>Name</code> of a <a href='x'>bucket</a>.</p><ul><li>A &amp; B</li><li>C&#39;s</li></ul>"
    assert plain_text(markup) == "The Name of a bucket. A & B C's"


class TextExtractor(HTMLParser):
    """The standard library's reading of a fragment: its text, a space for each tag that is not inside a sentence."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object = None) -> None:
        if tag not in {"a", "b", "code", "em", "i", "link", "replaceable", "strong", "u"}:
            self.text += " "

    handle_endtag = handle_starttag

    def handle_comment(self, data: str) -> None:
        self.text += " "


def test_markup_is_read_as_an_html_parser_reads_it() -> None:
    fragments = [
        "a <b>bold</b> <!-- <p> no & -->word &lt;p&gt; 1 < 2 &copy; &#x41;&notathing; R&D",
        '<P class="x y">One</P><br/>two<BR>three<A HREF="?b=c&amp;d">four</A>five <replaceable>x</replaceable>',
    ]
    data = Path(botocore.__file__).parent / "data"
    for service in ("s3", "sts", "iam"):
        model = json.loads(gzip.decompress(max((data / service).glob("*/service-2.json.gz")).read_bytes()))
        fragments += [shape["documentation"] for shape in model["shapes"].values() if "documentation" in shape]
    assert len(fragments) > 300
    for fragment in fragments:
        extractor = TextExtractor()
        extractor.feed(fragment)
        extractor.close()
        assert plain_text(fragment) == re.sub(r"\s+", " ", extractor.text).strip()
