"""What is read of files as people have them: the texts, exactly; or one line with the file and the place in it."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from calm_core.corpus.documents import documents
from calm_core.corpus.plain_text import count_units
from calm_core.corpus.tokenise import tokenise
from calm_core.errors import CalmError
from calm_core.params import CorpusParams, Params

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


def files(params: Params, *paths: Path, **changes: Any) -> CorpusParams:
    changes = {"source": "files", "paths": [str(path) for path in paths], **changes}
    return CorpusParams.model_validate({**params.corpus.model_dump(), **changes})


def read(params: Params, path: Path, content: bytes | str, **changes: Any) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(documents(files(params, path, **changes)))


def refused(params: Params, path: Path, content: bytes | str, **changes: Any) -> str:
    with pytest.raises(CalmError) as raised:
        read(params, path, content, **changes)
    return str(raised.value).removeprefix(f"{path.parent}/")


def save(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


OTHER_COLUMNS = [
    [{"score": 1}] * 3999 + [{"score": 0.5}],
    [{"by": None}] * 2000 + [{"by": "Ann"}, {"by": ["Ann", "Bob"]}, {"by": {"name": "Ann"}}],
    [{}] * 2000 + [{"late": "key"}],
    [{"time": "2020-01-01"}, {"time": "soon"}, {"time": 3}, {"nothing": {}}, {"many": []}, {"many": [1, "a", None]}],
    [{"large": "DIGITS"}, {"large": -1}, {"not a number": float("nan")}, {"half": "\ud800"}],
]


@pytest.mark.parametrize("others", OTHER_COLUMNS)
def test_other_columns_of_json_do_not_matter(tmp_path: Path, params: Params, others: list[dict[str, Any]]) -> None:
    texts = [f"text {number}" for number in range(len(others))]
    lines = [json.dumps({**row, "text": text}) for row, text in zip(others, texts, strict=True)]
    lines = [line.replace('"DIGITS"', "9" * 5000) for line in lines]  # more than Python takes for an integer
    assert read(params, tmp_path / "a.jsonl", "\n".join(lines)) == texts
    assert read(params, tmp_path / "b.json", f"[{','.join(lines)}]") == texts


def test_columns_of_parquet_files_side_by_side_do_not_matter(tmp_path: Path, params: Params) -> None:
    save(tmp_path / "a.parquet", {"text": ["one", "two"], "id": [1, 2]})
    save(tmp_path / "b.parquet", {"id": ["x"], "text": ["three"], "url": ["u"]})
    save(tmp_path / "c.parquet", {"text": pyarrow.array([], pyarrow.string())})
    save(tmp_path / "c2.parquet", {"id": pyarrow.array([], pyarrow.string())})
    assert list(documents(files(params, tmp_path))) == ["one", "two", "three"]
    save(tmp_path / "d.parquet", {"content": ["four"], "id": [1]})
    with pytest.raises(CalmError, match="d.parquet has no field 'text'; corpus.text_field can be: content, id$"):
        next(documents(files(params, tmp_path)))  # before the first is read


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_every_column_of_text_in_parquet(tmp_path: Path, params: Params, kind: Any) -> None:
    kind = getattr(pyarrow, kind)() if isinstance(kind, str) else kind
    texts = ["short", "a text of more than a dozen bytes", None, "short", ""]
    column = pyarrow.array(texts, pyarrow.string())
    path = save(
        tmp_path / "a.parquet", {"text": column.dictionary_encode() if "dict" in str(kind) else column.cast(kind)}
    )
    assert list(documents(files(params, path))) == [text for text in texts if text]


def test_names_of_columns_with_a_dot(tmp_path: Path, params: Params) -> None:
    path = save(tmp_path / "a.parquet", {"text.a": ["right"], "text": [{"a": "wrong", "b": 1}]})
    assert list(documents(files(params, path, text_field="text.a"))) == ["right"]
    with pytest.raises(CalmError, match=r"field 'text' holds struct<.*, not text; .*\(text here: text.a\)"):
        list(documents(files(params, path)))


def test_rows_without_text_are_counted_and_told_once(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"id": 1}\n\n{"text": "one"}\n{"text": " \\n"}\n')
    (tmp_path / "b.jsonl").touch()
    save(tmp_path / "c.parquet", {"text": ["two", None, "", "three"]})
    save(tmp_path / "d.parquet", {"text": pyarrow.nulls(3)})
    assert list(documents(files(params, tmp_path))) == ["one", "two", "three"]
    told = capsys.readouterr().err.splitlines()
    assert told[1:] == ["corpus: 8 of 11 rows have no text (null, absent or empty) and were skipped"]
    assert list(documents(files(params, tmp_path, documents=1))) == ["one"]
    assert "2 of 3 rows" in capsys.readouterr().err
    with pytest.raises(CalmError, match="the corpus holds no text in 3 rows"):
        list(documents(files(params, tmp_path / "d.parquet")))


def test_a_field_that_no_row_has_is_an_error(tmp_path: Path, params: Params) -> None:
    lines = [json.dumps({"body": "x", f"key {number % 2}": number}) for number in range(200)]
    told = refused(params, tmp_path / "a.jsonl", "\n".join(lines))
    assert told == "a.jsonl has no field 'text'; corpus.text_field can be: body, key 0, key 1"
    assert read(params, tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "late"}'])) == ["late"]
    many = "".join(json.dumps({f"key {number}": 1}) + "\n" for number in range(100_000))
    assert len(refused(params, tmp_path / "a.jsonl", many)) < 5000


GOOD = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(200))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "cut', "cannot be read as json: line 201, column 10: Unterminated string starting at"),
        ('{"text": "x"},\n', "cannot be read as json: line 201, column 14: Extra data"),
        ("null\n", "cannot be read as json: line 201 holds null, no object"),
        ('"text"\n', "cannot be read as json: line 201 holds a string, no object"),
        ('{"text": 3.5}\n', ", line 201: field 'text' holds a number, not text; change corpus.text_field"),
        ('{"text": false}\n', ", line 201: field 'text' holds true or false, not text"),
        ('{"text": [{"content": "x"}], "title": "t"}\n', "holds a list, not text; change corpus.text_field (text h"),
        ('{"text": "\\ud800"}\n', ", line 201: the text holds \\ud800, half a character"),
        ('{"text": "x", "b": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 201 nests too many levels"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", ["", '{"text": "more"}\n'])
def test_a_fault_has_its_file_and_line(tmp_path: Path, params: Params, line: str, told: str, more: str) -> None:
    if more and not line.endswith("\n"):
        line += "\n"
    message = refused(params, tmp_path / "a.jsonl", GOOD + line + more)
    assert told in message
    assert message.endswith("the file ends in this line, cut short?") is not line.endswith("\n")


def test_faults_of_files_that_are_read_whole(tmp_path: Path, params: Params) -> None:
    rows = [{"text": "one"}, {"text": 3}]
    assert ", entry 2: field 'text' holds a number" in refused(params, tmp_path / "a.json", json.dumps(rows))
    told = refused(params, tmp_path / "a.json", json.dumps(rows, indent=1)[:-5])
    assert told == "a.json cannot be read as json: line 6, column 12: Expecting ',' delimiter"
    told = refused(params, tmp_path / "a.json", '{"data": [{"text": "one"}]}')
    assert told == "a.json has no field 'text'; corpus.text_field can be: data"


def test_json_in_other_layouts(tmp_path: Path, params: Params) -> None:
    rows = [{"text": "one", "list": [1]}, {"text": "two\r\n"}]
    whole, *lines = (json.dumps(value, indent=1) for value in (rows, *rows))
    texts = ["one", "two\r\n"]
    assert read(params, tmp_path / "a.json", whole) == texts
    assert read(params, tmp_path / "a.jsonl", whole) == texts
    assert read(params, tmp_path / "a.json", "\n".join(lines)) == texts
    assert read(params, tmp_path / "a.json", lines[0]) == ["one"]
    assert refused(params, tmp_path / "a.jsonl", '{"text": "x"} {}').endswith("line 1, column 15: Extra data")
    assert read(params, tmp_path / "a.json", '["one", "two"]') == ["one", "two"]
    assert read(params, tmp_path / "a.json.gz", gzip.compress(GOOD.encode()))[199:] == ["text 199"]
    assert read(params, tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n {"text": "two\tx"}') == [
        "one",
        "two\tx",
    ]
    apart = json.dumps({"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False)
    assert read(params, tmp_path / "a.jsonl", f"{apart}\n{apart}\n") == ["a\u2028b\u2029c\x85d"] * 2
    assert read(params, tmp_path / "a.jsonl", '{"text": "first", "text": "\\ud83d\\ude42"}') == ["\U0001f642"]


NOISE = random.Random(0).randbytes(200_000).hex()
LONG = "".join(f"line {number} {NOISE[number * 80 : number * 80 + 80]}\n" for number in range(4000))


@pytest.mark.parametrize("ending", PACK)
def test_archives_cut_short_are_an_error(tmp_path: Path, params: Params, ending: str) -> None:
    path, packed = tmp_path / f"a.txt{ending}", PACK[ending](LONG.encode())
    assert len(packed) > 2 << 16  # more than what is read at once
    assert read(params, path, packed) == [LONG]
    short = PACK[ending](b"a few words")
    for kept in (0, 1, 3, 300, len(packed) // 2, len(packed) - 300, len(packed) - 8, len(packed) - 1):
        assert "cannot be read: " in refused(params, path, packed[:kept]), kept
        if 0 < kept < len(packed) // 2:  # in the second of two streams
            assert "cannot be read: " in refused(params, path, short + packed[:kept]), kept
    for kept in range(len(short)):
        assert "cannot be read: " in refused(params, path, short[:kept]), kept


@pytest.mark.parametrize("ending", PACK)
def test_archives_of_several_streams_are_read_whole(tmp_path: Path, params: Params, ending: str) -> None:
    path, parts = tmp_path / f"a.txt{ending}", [PACK[ending](part.encode()) for part in (LONG, "", "end")]
    assert read(params, path, b"".join(parts)) == [f"{LONG}end"]
    assert "cannot be read: " in refused(params, path, b"".join(parts) + b"garbage")
    damaged = bytearray(parts[2])
    damaged[1] ^= 4  # a stream that is not known as one
    assert "cannot be read: " in refused(params, path, parts[0] + damaged)
    if ending in (".gz", ".xz"):  # which may be filled up with zeros
        assert read(params, path, parts[0] + bytes(1 << 17) + parts[2] + bytes(4)) == [f"{LONG}end"]


def test_parquet_in_an_archive_or_cut_short(tmp_path: Path, params: Params) -> None:
    whole = save(tmp_path / "a.parquet", {"text": ["one", "two"]}).read_bytes()
    assert read(params, tmp_path / "b.parquet.gz", gzip.compress(whole)) == ["one", "two"]
    for kept in (0, 3, len(whole) // 2, len(whole) - 1):
        assert refused(params, tmp_path / "a.parquet", whole[:kept]).startswith("a.parquet cannot be read: ")


def test_encodings(tmp_path: Path, params: Params) -> None:
    text = "Some wörds, and more\nof them."
    assert read(params, tmp_path / "a.txt", text.encode("utf-8-sig")) == [text]
    assert read(params, tmp_path / "a.txt", text.replace("\n", "\r\n").encode()) == [text]
    assert read(params, tmp_path / "a.txt", "a\0b") == ["a\0b"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        told = refused(params, tmp_path / "a.txt", text.encode(encoding))
        assert told == "a.txt is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    told = refused(params, tmp_path / "a.txt", b"one\ntwo\ncaf\xe9")
    assert told.startswith("a.txt is not UTF-8 text (byte 11, 0xe9 in line 3); convert it")
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xe9")]
    )
    path = save(tmp_path / "a.parquet", {"text": pyarrow.chunked_array([["text"] * 70, column])})
    with pytest.raises(CalmError, match="a.parquet, row 71: the text is not UTF-8"):
        list(documents(files(params, path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_pointers_are_not_read_for_files(tmp_path: Path, params: Params, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n"
    assert "is a pointer of Git LFS, not the file itself" in refused(params, tmp_path / name, pointer)


def test_paragraphs_end_where_they_end_whatever_is_read_at_once(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    paragraphs = [f"{number}.\nIts second line" for number in range(60)]
    for size in range(1, 40):
        monkeypatch.setattr("calm_core.corpus.plain_text.PIECE_BYTES", size)
        for between in ("\n\n", "\r\n\r\n", "\n\n\n", "\n\n\n\n\n"):
            content = between.join(paragraphs)
            assert read(params, tmp_path / "a.txt", content, text_unit="paragraph") == paragraphs
            assert read(params, tmp_path / "a.txt", content, text_unit="line") == "\n".join(paragraphs).split("\n")


def test_units_are_counted_as_they_are_read(tmp_path: Path, params: Params) -> None:
    draws, path = random.Random(0), tmp_path / "a.txt"
    for _ in range(100):
        content = "".join(draws.choices(["a", "b c", "\n", "\n\n", "\r\n", " ", "\n \n"], k=draws.randrange(30)))
        path.write_bytes(f"x\n{content}".encode())
        texts = {unit: len(list(documents(files(params, path, text_unit=unit)))) for unit in ("paragraph", "line")}
        assert count_units([path, path], 1000) == {unit: 2 * number for unit, number in texts.items()}
    path.write_text("line\n" * 50)
    assert count_units([path], 20) == {"paragraph": 1, "line": 20}


def test_one_text_file_says_how_to_divide_it(tmp_path: Path, smoke: Params) -> None:
    path = tmp_path / "input.txt"
    path.write_text("".join(f"Speaker {number}:\nSome words\n\n" for number in range(700)))
    params = smoke.model_copy(update={"corpus": files(smoke, path)})
    told = "to paragraph (700 documents) or line (1,400 documents)"
    with pytest.raises(CalmError, match="input.txt is one document, but all three splits need text") as raised:
        tokenise(params, tmp_path)
    assert str(raised.value).endswith(f"set corpus.text_unit {told}")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    with pytest.raises(CalmError, match="cut.txt.gz cannot be read: Compressed file ended"):
        tokenise(smoke.model_copy(update={"corpus": files(smoke, tmp_path / "cut.txt.gz")}), tmp_path)
    (tmp_path / "cut.txt.gz").unlink()
    paragraphs = files(smoke, path, text_unit="paragraph", deduplicate=False)
    (tmp_path / "tokens").mkdir()
    splits = tokenise(smoke.model_copy(update={"corpus": paragraphs}), tmp_path / "tokens")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 700
    assert min(split["documents"] for split in splits.values()) > 10
    (tmp_path / "book 2.txt").write_text("A second book.\n\nIts second paragraph.\n")
    (tmp_path / "tokens 2").mkdir()
    corpus = files(smoke, tmp_path / "*.txt", validation_percent=0.001)
    with pytest.raises(CalmError, match="none of the corpus's 2 documents falls into the validation split") as raised:
        tokenise(smoke.model_copy(update={"corpus": corpus}), tmp_path / "tokens 2")
    assert str(raised.value).endswith(told.replace("700", "702").replace("1,400", "1,402"))
