"""Corpora of any bytes, in every format: read, or refused in one line; and every text survives the tokenizer."""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow
import pytest
import yaml
from hypothesis import example, given, reject
from hypothesis import strategies as st

from calm_core.corpus.documents import documents
from calm_core.corpus.splits import SPLITS, split_of
from calm_core.params import CorpusParams
from calm_core.tokens.tokenizer import END_OF_TEXT, PAD, end_of_text_id, load_tokenizer, train_tokenizer
from tests import ROOT, needs_linux
from tests.reliability.support.bad_input import TEXTS, Content, assert_one_line, complaint, damaged, tries
from tests.reliability.support.corpus_reader import CorpusReader

CORPUS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["corpus"]

LONG = st.builds(lambda text, times: text * times, st.text(max_size=20), st.sampled_from([0, 1, 2, 1000, 20_000]))
SCRIPTS = st.sampled_from(
    ["", "\0", "\ufeff", "\u202e\u200d\u200b", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301\u0327" * 50, "\U0010ffff\ufffd\ufffe", "مرحبا",
     "हिन्दी", "漢字かな", "한국어", "ᚠᛇᚻ",
     "\x1b[2J\x07\x08\x7f\x80\x9f", "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", "<eos>", "<pad><eos>", "Ġ Ċ Ð", "a\0b"]
)  # fmt: skip
ANY_TEXT = (TEXTS | SCRIPTS | LONG | st.builds("{}{}".format, SCRIPTS, TEXTS)).filter(
    lambda text: not any("\ud800" <= character <= "\udfff" for character in text)
)


@pytest.fixture(scope="module")
def reader() -> Iterator[CorpusReader]:
    reader = CorpusReader()
    yield reader
    reader.end()


def files(*paths: Path, **changes: Any) -> CorpusParams:
    return CorpusParams.model_validate({**CORPUS, "source": "files", "paths": [str(path) for path in paths], **changes})


def read(reader: CorpusReader, path: Path, content: bytes, **changes: Any) -> list[str] | None:
    """What a file of ``content`` holds, None if it is refused."""
    path.write_bytes(content)
    try:
        found = reader.read(files(path, **changes))
    finally:
        path.unlink()
    if isinstance(found, str):
        assert_one_line(found)
        return None
    return found


COMPRESS = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, 1, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


@pytest.mark.parametrize(("unit", "examples"), [("document", 100), ("line", 60), ("paragraph", 60)])
def test_any_bytes_as_text(unit: str, examples: int, reader: CorpusReader, tmp_path: Path) -> None:
    @tries(examples)
    @given(content=st.binary(max_size=300) | ANY_TEXT.map(str.encode), packing=st.sampled_from([*COMPRESS, ""]))
    def attempt(content: bytes, packing: str) -> None:
        found = read(reader, tmp_path / f"a.txt{packing}", COMPRESS[packing](content), text_unit=unit)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            assert found is None
            return
        if found is None and text.strip():  # UTF-16 without its mark
            assert 3 * content.count(0) > len(content) >= 8
            return
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
        if unit == "document":
            assert found == ([text] if text.strip() else None)
        elif unit == "line":
            assert (found or []) == [line for line in text.split("\n") if line.strip()]
        else:
            assert "".join("".join(found or []).split()) == "".join(text.split())

    attempt()


@tries(120)
@given(texts=st.lists(ANY_TEXT, max_size=4), ascii_only=st.booleans(), packing=st.sampled_from([*COMPRESS, ""]))
def test_any_texts_as_json_lines(
    texts: list[str], ascii_only: bool, packing: str, reader: CorpusReader, tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=ascii_only) + "\n" for text in texts)
    found = read(reader, tmp_path / f"a.jsonl{packing}", COMPRESS[packing](lines.encode()))
    assert (found or []) == [text for text in texts if text.strip()]


@tries(60)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_texts_as_parquet(texts: list[str], reader: CorpusReader, tmp_path: Path) -> None:
    saved = io.BytesIO()
    pl.DataFrame({"text": texts}).write_parquet(saved)
    found = read(reader, tmp_path / "a.parquet", saved.getvalue())
    assert (found or []) == [text for text in texts if text.strip()]


SAVED = io.BytesIO()
pl.DataFrame({"text": ["one text", "another one", "ünd", "x" * 100], "n": [1, 2, 3, 4]}).write_parquet(SAVED)
JSON_LINES = b'{"text": "one", "n": [1, {"a": null}]}\n{"text": "tw\\u00f6 \\"x\\"", "n": []}\n{"text": "\xc3\xa9"}\n'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["2020-01-01", "1", "1e5"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", ""]) | TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)
JSON = st.lists(VALUES | st.fixed_dictionaries({"text": VALUES}), max_size=4).map(
    lambda values: "\n".join(json.dumps(value) for value in values).encode()
) | VALUES.map(lambda value: json.dumps(value, indent=1).encode())


@pytest.mark.parametrize(("name", "content", "examples"), [
    ("a.parquet", SAVED.getvalue(), 120),
    ("a.jsonl", JSON_LINES, 120),
    ("a.json", b'[{"text": "one"}, {"text": "two"}]', 60),
    ("a.jsonl.gz", gzip.compress(JSON_LINES, mtime=0), 40),
    ("a.jsonl.bz2", bz2.compress(JSON_LINES), 30),
    ("a.jsonl.xz", lzma.compress(JSON_LINES), 30),
    ("a.jsonl.zst", COMPRESS[".zst"](JSON_LINES), 30),
    ("a.txt.gz", gzip.compress("some tëxt".encode() * 50, mtime=0), 40),
])  # fmt: skip
def test_any_damage(name: str, content: bytes, examples: int, reader: CorpusReader, tmp_path: Path) -> None:
    @tries(examples)
    @given(changed=damaged(content) | st.binary(max_size=100).map(Content))
    def attempt(changed: bytes) -> None:
        read(reader, tmp_path / name, changed)

    attempt()
    assert read(reader, tmp_path / name, content)


@tries(150)
@given(content=JSON, suffix=st.sampled_from(["json", "jsonl"]), field=st.sampled_from(["text", "text", "a", "", "b"]))
@example(content=b"null\n", suffix="jsonl", field="text")
@example(content=b'null\n{"text": "x"}\n', suffix="jsonl", field="text")
@example(content=b" \n\nnull", suffix="json", field="text")
@example(content=b"[\n null,\n {}\n]", suffix="json", field="text")
@example(content=b'[{"text": "x"}, null]', suffix="json", field="text")
def test_any_json(content: bytes, suffix: str, field: str, reader: CorpusReader, tmp_path: Path) -> None:
    read(reader, tmp_path / f"a.{suffix}", content, text_field=field)


@pytest.mark.parametrize("content", [
    b'{"text": "x", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    b'{"text": "x"}\n{"text": "x", "b": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}\n",
    b'{"text": "x", "b":\n' + b"[\n" * 50_000 + b"]\n" * 50_000 + b"}\n",
    b"[" * 1_000_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"text": "' + b"x" * 1_000_000,
    b'{"text": ' + b"9" * 100_000 + b"}",
    b'{"' + b"k" * 1_000_000 + b'": 1}',
    b'{"text": "\\ud800"}\n',
    b'[{"text": "\\ud800"}]\n',
    b"{" + b",".join(b'"%d": 1' % number for number in range(2000)) + b"}\n",
])  # fmt: skip
def test_json_that_is_built_to_harm(content: bytes, reader: CorpusReader, tmp_path: Path) -> None:
    assert read(reader, tmp_path / "a.jsonl", content) is None


def test_levels_and_strings_that_look_like_them(reader: CorpusReader, tmp_path: Path) -> None:
    brackets = "[{" * 2000 + '"\\' * 20
    nested = json.dumps({"text": brackets, "b": json.loads("[" * 500 + "]" * 500)}) + "\n"
    assert read(reader, tmp_path / "a.jsonl", nested.encode() * 3) == [brackets] * 3


@needs_linux
@pytest.mark.slow
def test_a_small_file_that_unpacks_to_more_than_there_is(reader: CorpusReader, tmp_path: Path) -> None:
    """Two gigabytes of one line: out of memory is an error that is told, not a process that dies."""
    packed = gzip.compress(b"x" * (1 << 24)) * 128
    assert len(packed) < 1 << 22
    path = tmp_path / "a.txt.gz"
    path.write_bytes(packed)
    with pytest.raises(AssertionError, match="MemoryError"):
        reader.read(files(path))


NAMES = TEXTS.map(lambda text: text.replace("/", "").replace("\0", "")[:20])


@tries(60)
@given(name=NAMES | st.sampled_from(["a[1]", "*", "?", "{a,b}", "~", "-", " ", "a b%20", "#", "\n", "\\"]))
def test_any_file_name(name: str, reader: CorpusReader, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.txt"
    try:
        path.touch()
    except OSError:  # macOS takes only characters that it knows
        reject()
    found = read(reader, path, b"some text")
    assert found == ["some text"] or not name or "::" in name or name.startswith(".")


@tries(100)
@given(pattern=TEXTS | st.sampled_from(["", "\0", "x" * 5000, "nothing/**", "[", "\udcff", "http://localhost:1/a.txt"]))
def test_any_path(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = CorpusParams.model_validate({**CORPUS, "source": "files", "paths": [pattern]})
    assert complaint(lambda: list(documents(corpus)))


def test_what_is_no_file_is_not_waited_for(reader: CorpusReader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    for name in ("pipe.txt", "folder.txt", "endless.txt", "circle.txt", "*", "."):
        assert "matches no file" in reader.read(files(tmp_path / name))


@tries(200)
@given(text=ANY_TEXT, learned=st.lists(ANY_TEXT, max_size=3))
def test_decode_of_encode_is_the_text(text: str, learned: list[str], tmp_path: Path) -> None:
    trained = train_tokenizer([part[:2000] for part in learned], 270)
    trained.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (trained, load_tokenizer(tmp_path / "tokenizer.json")):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
        assert tokenizer.decode(token_ids) == text
        assert end_of_text_id(tokenizer) not in token_ids
        assert tokenizer.token_to_id(PAD) not in token_ids


def test_names_of_special_tokens_are_text() -> None:
    tokenizer = train_tokenizer([f"{END_OF_TEXT} {PAD}"] * 5, 300)
    for text in (END_OF_TEXT, PAD, f"a{END_OF_TEXT}b", f"{PAD}{END_OF_TEXT}" * 3):
        assert tokenizer.decode(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids) == text


@tries(200)
@given(text=st.text(st.characters()), percent=st.floats(0, 100))
def test_any_text_has_its_split(text: str, percent: float) -> None:
    assert split_of(text, percent, 100 - percent) in SPLITS
