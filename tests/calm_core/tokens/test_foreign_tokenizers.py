"""tokenizer.json files as people have them: their texts come back whole, or the user is told what does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors

from calm_core.corpus.tokenise import tokenise
from calm_core.errors import CalmError
from calm_core.params import DocumentMarksKind, Params, parse_params
from calm_core.tokens.document_marks import (
    DocumentMarks,
    document_marks,
    kind_of_tokens,
    marks_of_tokens,
    post_processor_marks,
)
from calm_core.tokens.round_trip import KINDS, told_changes, told_losses
from calm_core.tokens.shards import TokenStream, TokenWriter
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer, require_fit, vocabulary_size_of
from tests.calm_core.tokens.published import PUBLISHED, TEXT, byte_level, write

TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False))


def with_tokenizer(smoke: Params, path: Path, texts: list[str], size: int | None = None) -> Params:
    """Params of a corpus of ``texts`` beside ``path``, with that tokenizer."""
    corpus = path.parent / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    section = {"path": str(path), "vocabulary_size": size or vocabulary_size_of(load_tokenizer(path))}
    source = {
        "source": "files",
        "paths": [str(corpus)],
        "validation_percent": 20.0,
        "test_percent": 20.0,
        "deduplicate": False,
    }
    return smoke.model_copy(
        update={
            "corpus": smoke.corpus.model_copy(update=source),
            "tokenizer": smoke.tokenizer.model_copy(update=section),
        }
    )


def tokenised(params: Params, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return tokenise(params, folder)


@pytest.mark.parametrize(
    "setting", [{"truncation": TRUNCATION}, {"padding": PADDING}, {"truncation": TRUNCATION, "padding": PADDING}, {}]
)
@pytest.mark.parametrize("dropout", [None, 0.5])
def test_a_corpus_has_the_same_tokens_whatever_is_saved_with_the_tokenizer(
    setting: dict[str, Any], dropout: float | None, tmp_path: Path, smoke: Params
) -> None:
    texts = [f"{TEXT} {number}" for number in range(60)]
    plain = byte_level("<pad>", "<eos>")
    model = json.loads(plain.to_str())["model"] | {"dropout": dropout}
    path = write(plain, tmp_path / "given", model=model, **setting)
    expected = sum(len(plain.encode(text).ids) + 1 for text in texts)
    description = tokenised(with_tokenizer(smoke, path, texts), tmp_path / "tokens")
    assert sum(split["tokens"] for split in description["splits"].values()) == expected
    # What is saved for the stages after this one is the plain tokenizer.
    assert json.loads((tmp_path / "tokens/tokenizer.json").read_text()) == json.loads(plain.to_str())
    assert encode(load_tokenizer(path), TEXT * 20) == plain.encode(TEXT * 20).ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_loaded_tokenizer_is_saved_as_it_was_loaded(name: str, tmp_path: Path) -> None:
    """Stages compare the tokenizer of a model with that of the tokens by their files."""
    load_tokenizer(write(PUBLISHED[name](), tmp_path)).save(str(tmp_path / "first.json"))
    load_tokenizer(tmp_path / "first.json").save(str(tmp_path / "second.json"))
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


@pytest.mark.parametrize("name", ["gpt-2", "llama-3", "roberta"])
def test_a_byte_level_tokenizer_gives_every_text_back(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(PUBLISHED[name](), tmp_path))
    for text in [*KINDS.values(), "a <mask> b", "<s> </s> <|endoftext|><|end_of_text|>", "".join(KINDS.values())]:
        assert decode(tokenizer, encode(tokenizer, text)) == text
    assert told_losses(tokenizer) is None
    assert told_changes(tokenizer, KINDS.values()) is None


@pytest.mark.parametrize(
    ("name", "began", "token_ids", "without"),
    [
        # By hand from the merges: "▁He" is 264, "▁t" 265, and "He" at the start of a text 266.
        ("llama-2", "▁He", [266, 265, 264], "He t He"),
        ("roberta", "ĠH", None, "He t He"),
        ("t5", "▁", None, "over the"),
    ],
)
def test_no_space_is_put_before_a_text_or_taken_from_a_continuation(
    name: str, began: str, token_ids: list[int] | None, without: str, tmp_path: Path
) -> None:
    as_published = PUBLISHED[name]()
    assert as_published.encode(without, add_special_tokens=False).tokens[0].startswith(began[0])
    tokenizer = load_tokenizer(write(as_published, tmp_path))
    found = encode(tokenizer, without)
    if token_ids:
        assert found == token_ids
    assert not (tokenizer.id_to_token(found[0]) or "").startswith(began[0])
    assert decode(tokenizer, found) == without
    # A model's text goes on after a prompt: each part has its spaces.
    parts = [decode(tokenizer, found[:cut]) + decode(tokenizer, found[cut:]) for cut in range(len(found))]
    assert parts == [without] * len(parts)
    assert decode(tokenizer, encode(tokenizer, f" {without} ")) == f" {without} "


@pytest.mark.parametrize(
    ("name", "example", "cause", "lost", "kept"),
    [
        ("qwen", r"'cafe\u0301 n\u0303' comes back as 'caf\xe9 \xf1'", "normalizer NFC", ["combining accents"], []),
        ("llama-2", "'a▁b' comes back as 'a b'", "normalizer Replace", ["the character ▁ (U+2581)"], []),
        ("uncased", "'The QUICK Fox' comes back as 'the quick fox'", "normalizer Lowercase",
         ["capital letters", "accents"], ["spaces in a row", "line breaks", "emoji"]),
        ("bert", "'The QUICK Fox' comes back as 'the quick fox'", "normalizer BertNormalizer, one token for all",
         ["spaces in a row", "line breaks", "tabs"], ["small letters", "a document ends at"]),
        ("t5", "comes back as", "normalizer NFKC, one token for all",
         ["full-width", "a document ends at: the text '</s>'; "], ["small letters", "tabs,"]),
        ("without decoder", "comes back as 'the Ġqu ick", "no decoder", ["small letters"], ["normalizer"]),
    ],
)  # fmt: skip
def test_what_is_not_given_back_is_told(
    name: str, example: str, cause: str, lost: list[str], kept: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write(PUBLISHED[name](), tmp_path))
    told = told_losses(tokenizer) or ""
    assert f"{example}" in told
    assert f"({cause}" in told
    listed = told.split("lost are: ")[1]
    assert all(kind in listed for kind in lost)
    assert not any(kind in listed for kind in kept)
    if name in ("qwen", "llama-2"):
        assert listed.startswith(f"{lost[0]}; ")  # that alone


def test_the_first_documents_are_looked_at_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(PUBLISHED["uncased"](), tmp_path))
    texts = ["all small", "Then a Capital", "small", "x" * 60 + " AND LATE"]
    assert told_changes(tokenizer, texts) == (
        "of the first 4 documents 2 do not come back from their tokens: 'Then a Capital' as 'then a capital'"
    )
    assert told_changes(tokenizer, texts[::2]) is None
    assert "'xxxxxxxxx AND LATE' as 'xxxxxxxxx and late'" in (told_changes(tokenizer, texts[3:]) or "")


def test_the_stage_tells_before_it_reads_on(tmp_path: Path, smoke: Params, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(PUBLISHED["uncased"](), tmp_path / "given")
    texts = [f"Document {number}" for number in range(60)]
    tokenised(with_tokenizer(smoke, path, texts), tmp_path / "tokens")
    first, second = [line for line in capsys.readouterr().err.splitlines() if "come" in line]
    assert first.startswith(f"tokenise: {path}: it does not give every text back: 'The QUICK Fox' comes back as")
    assert "of the first 60 documents 60 do not come back from their tokens: 'Document 0' as 'document 0'" in second
    tokenised(with_tokenizer(smoke, write(byte_level("<eos>"), tmp_path / "exact"), texts), tmp_path / "exact/tokens")
    assert "come" not in capsys.readouterr().err


def test_names_of_special_tokens_in_documents_are_text(tmp_path: Path, smoke: Params) -> None:
    texts = [f"a <eos> in text {number}<pad>" for number in range(80)]
    for path in ("", str(write(byte_level("<pad>", "<eos>"), tmp_path / "given"))):
        params = with_tokenizer(smoke, tmp_path / "given/tokenizer.json", texts)
        section = params.tokenizer.model_copy(update={"path": path, "vocabulary_size": 300})
        folder = tmp_path / f"tokens{bool(path)}"
        description = tokenised(params.model_copy(update={"tokenizer": section}), folder)
        for split, counts in description["splits"].items():
            stream = TokenStream(folder, split)
            token_ids = stream.slice(0, len(stream))
            assert (token_ids == description["end_of_text_id"]).sum() == counts["documents"]
            assert (token_ids == 0).sum() == 0


@pytest.mark.parametrize("name", ["llama-3", "roberta", "t5", "qwen"])
def test_documents_are_joined_as_the_params_say(name: str, tmp_path: Path, smoke: Params) -> None:
    """By post_processor as the library itself encodes a text; by default as always, and nothing is told of it."""
    path = write(PUBLISHED[name](), tmp_path / "given")
    library, texts = load_tokenizer(path), [f"{TEXT} {number}" for number in range(60)]
    params, end = with_tokenizer(smoke, path, texts), end_of_text_id(library)
    bare = {tuple(encode(library, text)) for text in texts}
    expected: dict[DocumentMarksKind, set[tuple[int, ...]]] = {
        "end_of_text": {(*ids, end) for ids in bare},
        # Where the library puts nothing, an end of text.
        "post_processor": {tuple(library.encode(text).ids) if name != "qwen" else (*encode(library, text), end)
                           for text in texts},
    }  # fmt: skip
    for kind, documents in expected.items():
        section = params.tokenizer.model_copy(update={"document_marks": kind})
        described = tokenised(params.model_copy(update={"tokenizer": section}), tmp_path / kind)
        found = set()
        for split in described["splits"]:
            stream = TokenStream(tmp_path / kind, split)
            ends = stream.document_ends.tolist()
            token_ids = stream.slice(0, len(stream)).tolist()
            found |= {tuple(token_ids[start:after]) for start, after in zip([0, *ends], ends, strict=False)}
        assert found == documents
        assert described.get("document_marks") == (kind if kind == "post_processor" else None)
        assert kind_of_tokens(tmp_path / kind) == kind
        assert marks_of_tokens(tmp_path / kind) == document_marks(kind, library)


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_take_no_space_and_end_no_document(special: bool, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("<|endoftext|>", special=special, normalized=False),
            AddedToken("<x>", lstrip=True, rstrip=True, special=False, normalized=False),
            AddedToken("word", single_word=True, special=False),
        ]
    )
    loaded = load_tokenizer(write(tokenizer, tmp_path))
    end = end_of_text_id(loaded)
    assert end == 300
    for text in ("a  <x>  b", " <x>\n", "a<|endoftext|>b", "<|endoftext|> <x>", "word words word"):
        assert decode(loaded, encode(loaded, text)) == text
        assert end not in encode(loaded, text)
    assert 301 in encode(loaded, "a <x>")


def test_an_added_token_begins_no_document_in_a_text(tmp_path: Path) -> None:
    tokenizer = byte_level("<eos>")
    tokenizer.add_tokens([AddedToken("<bos>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 300)])
    loaded = load_tokenizer(write(tokenizer, tmp_path))
    assert post_processor_marks(loaded) == DocumentMarks(before=(300,))
    assert decode(loaded, encode(loaded, "a<bos>b")) == "a<bos>b"
    assert 300 not in encode(loaded, "a<bos>b")
    assert loaded.decode([300, *encode(loaded, "a")], skip_special_tokens=True) == "a"


def with_ids(tokenizer: Tokenizer, in_model: dict[str, int], added: dict[str, int]) -> dict[str, Any]:
    """Changes that give entries of the model, and added tokens, other ids."""
    values = json.loads(tokenizer.to_str())
    vocabulary = {name: token_id for name, token_id in values["model"]["vocab"].items() if name not in added}
    for token in values["added_tokens"]:
        token["id"] = added.get(token["content"], in_model.get(token["content"], token["id"]))
    return {"model": values["model"] | {"vocab": vocabulary | in_model}, "added_tokens": values["added_tokens"]}


@pytest.mark.parametrize("where", ["model", "added", "both"])
def test_ids_with_gaps(where: str, tmp_path: Path, smoke: Params) -> None:
    plain = byte_level("<pad>", "<eos>")
    ids = {"<eos>": 65_541}
    changes = with_ids(plain, {} if where == "added" else ids, {} if where == "model" else ids)
    path = write(plain, tmp_path / "given", **changes)
    tokenizer = load_tokenizer(path)
    assert (end_of_text_id(tokenizer), vocabulary_size_of(tokenizer)) == (65_541, 65_542)
    assert encode(tokenizer, TEXT) == plain.encode(TEXT).ids
    texts = [f"{TEXT} {number}" for number in range(60)]
    with pytest.raises(CalmError, match=r"has 65542 entries but tokenizer.vocabulary_size is 300; set it to 65542"):
        tokenised(with_tokenizer(smoke, path, texts, size=300), tmp_path / "refused")
    description = tokenised(with_tokenizer(smoke, path, texts), tmp_path / "tokens")
    assert (description["vocabulary_size"], description["end_of_text_id"]) == (65_542, 65_541)
    stream = TokenStream(tmp_path / "tokens", "train")
    ends = stream.document_ends - 1
    assert stream.slice(0, len(stream))[ends].tolist() == [65_541] * len(ends)
    assert load_tokenizer(tmp_path / "tokens/tokenizer.json").token_to_id("<eos>") == 65_541


def test_added_tokens_keep_their_ids_where_the_model_has_gaps(tmp_path: Path) -> None:
    """The library numbers them from its count of entries on: onto the ids of others."""
    plain = byte_level("<pad>")
    plain.add_special_tokens(["<eos>"])
    assert plain.token_to_id("<eos>") == 300
    path = write(plain, tmp_path, **with_ids(plain, {"Ġt": 400}, {"<eos>": 401}))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.token_to_id("<eos>"), tokenizer.id_to_token(400), vocabulary_size_of(tokenizer)) == (
        401,
        "Ġt",
        402,
    )


@pytest.mark.parametrize(
    ("in_model", "added", "told"),
    [
        ({"a": 299, "Ġt": 299}, {}, "id 299 stands for both"),
        ({}, {"<eos>": 70}, "id 70 stands for both"),
        ({"a": 1 << 24}, {}, "'a' has id 16,777,216; ids below 16,777,216 are allowed"),
        ({}, {"<eos>": 4_294_967_295}, "'<eos>' has id 4,294,967,295; ids below 16,777,216 are allowed"),
    ],
)
def test_ids_that_contradict_each_other(
    in_model: dict[str, int], added: dict[str, int], told: str, tmp_path: Path
) -> None:
    plain = byte_level("<pad>", "<eos>")
    path = write(plain, tmp_path, **with_ids(plain, in_model, added))
    with pytest.raises(CalmError) as caught:
        load_tokenizer(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_an_added_token_with_another_id_in_the_model(tmp_path: Path) -> None:
    plain = byte_level("<pad>", "<eos>")
    values = json.loads(plain.to_str())
    values["added_tokens"][1]["id"] = 7
    path = write(plain, tmp_path, added_tokens=values["added_tokens"])
    with pytest.raises(CalmError, match=r"contradict each other: '<eos>' has id 7 there, 1 here"):
        load_tokenizer(path)


def test_no_id_is_cast_to_another(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "train", 300)
    writer.write([0, 299])
    for wrong in (300, 65_541, -1):
        with pytest.raises(CalmError, match=f"token {wrong} is outside of the vocabulary of 300"):
            writer.write([1, wrong, 2])
    writer.flush()
    assert TokenStream(tmp_path, "train").slice(0, 2).tolist() == [0, 299]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt-2", "<|endoftext|>"), ("llama-3", "<|end_of_text|>"), ("roberta", "</s>"), ("qwen", "<|endoftext|>"),
     ("bert", "[SEP]"), ("t5", "</s>"), ("llama-2", "</s>")],
)  # fmt: skip
def test_the_end_of_a_text_in_published_tokenizers(name: str, expected: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(PUBLISHED[name](), tmp_path))
    assert tokenizer.id_to_token(end_of_text_id(tokenizer)) == expected


@pytest.mark.parametrize(
    ("special", "beside", "expected"),
    [
        (("</s>", "<|endoftext|>"), {}, "<|endoftext|>"),
        (("</s>", "<|endoftext|>"), {"tokenizer_config.json": {"eos_token": "</s>"}}, "</s>"),
        (("</s>", "<|endoftext|>"), {"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, "</s>"),
        (("</s>", "<|endoftext|>"), {"config.json": {"eos_token_id": 0}}, "</s>"),
        (("</s>", "<|endoftext|>"), {"config.json": {"eos_token_id": [0, 1]}}, "<|endoftext|>"),
        # A conversation's turn is no document.
        (("<|endoftext|>", "<|im_end|>"), {"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "<|endoftext|>"),
        (("<bos>", "<|fin|>"), {"tokenizer_config.json": {"eos_token": "<|fin|>"}}, "<|fin|>"),
        (("<bos>", "<|fin|>"), {"tokenizer_config.json": {"eos_token": "<elsewhere>"}}, None),
        (("<bos>", "<|fin|>"), {"tokenizer_config.json": [1]}, None),
        (("<bos>", "<｜end▁of▁sentence｜>"), {}, "<｜end▁of▁sentence｜>"),
    ],
)
def test_files_beside_decide_between_several_ends(
    special: tuple[str, ...], beside: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    path = write(byte_level(*special), tmp_path / "given")
    for name, content in beside.items():
        path.with_name(name).write_text(json.dumps(content))
    if expected is None:
        with pytest.raises(CalmError, match=r"no end-of-text token; .* or eos_token in a tokenizer_config.json"):
            load_tokenizer(path)
        return
    tokenizer = load_tokenizer(path)
    assert tokenizer.id_to_token(end_of_text_id(tokenizer)) == expected
    # The model's folder has tokenizer.json alone.
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    again = load_tokenizer(tmp_path / "model/tokenizer.json")
    assert again.id_to_token(end_of_text_id(again)) == expected
    assert encode(again, TEXT) == encode(tokenizer, TEXT) == byte_level(*special).encode(TEXT).ids


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_another_editor_wrote(encoding: str, tmp_path: Path) -> None:
    path = write(byte_level("<eos>"), tmp_path)
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert encode(load_tokenizer(path), TEXT) == byte_level("<eos>").encode(TEXT).ids


def test_a_folder_of_a_hub(tmp_path: Path) -> None:
    path = write(byte_level("<eos>"), tmp_path / "hub")
    assert vocabulary_size_of(load_tokenizer(path.parent)) == 300
    with pytest.raises(CalmError, match=r"nothing is missing; name a tokenizer.json or its folder"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",)])
def test_other_formats_get_the_remedy(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    for path in (tmp_path, *(tmp_path / name for name in names), tmp_path / "tokenizer.json"):
        with pytest.raises(CalmError) as caught:
            load_tokenizer(path)
        assert f"{tmp_path / names[0]} is of another format; convert it" in str(caught.value)
        assert f"from_pretrained({str(tmp_path)!r}).save_pretrained" in str(caught.value)


def test_a_small_vocabulary(tmp_path: Path, smoke: Params, values: dict[str, Any]) -> None:
    """Characters, as a first experiment has them: far below the 258 entries of bytes."""
    names = ["<eos>", *"abcdefgh "]
    tokenizer = Tokenizer(models.BPE({name: token_id for token_id, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(["<eos>"])
    path = write(tokenizer, tmp_path / "given", decoder={"type": "Fuse"})
    texts = [f"a bad cab {'abcdefgh'[number % 8] * (number + 1)}" for number in range(60)]
    description = tokenised(with_tokenizer(smoke, path, texts), tmp_path / "tokens")
    assert sum(split["tokens"] for split in description["splits"].values()) == sum(len(text) + 1 for text in texts)
    values["tokenizer"].update(path=str(path), vocabulary_size=10)
    assert parse_params(values).tokenizer.vocabulary_size == 10
    values["tokenizer"]["path"] = ""
    with pytest.raises(CalmError, match="vocabulary_size is 10; a trained tokenizer needs 258 or more"):
        parse_params(values)


@pytest.mark.parametrize(
    ("size", "rows", "fits"),
    [
        (128_256, 128_256, True),
        (128_256, 128_257, True),  # the published models: a row for [PAD]
        (50_257, 50_304, True),  # rounded up to a multiple of 64, as GPT-2 often is
        (32_011, 32_064, True),
        (151_665, 151_936, True),
        (100_015, 102_400, True),
        (128_256, 128_255, False),
        (128_256, 128_258, False),
        (50_257, 128_257, False),
        (50_257, 50_300, False),
        (65_542, 50_304, False),
        (300, 128_256, False),
        (300, 320, True),
        (300, 448, False),
    ],
)
def test_rows_and_ids(size: int, rows: int, fits: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": size - 1}, unk_token="a"))
    if fits:
        require_fit(tokenizer, rows, "it")
    else:
        with pytest.raises(CalmError, match=f"it has {size:,} token ids, the model {rows:,} rows"):
            require_fit(tokenizer, rows, "it")


def test_a_text_that_a_vocabulary_cannot_say(tmp_path: Path, smoke: Params, capsys: pytest.CaptureFixture[str]) -> None:
    """Words without one for the unknown: an error at a text with another word, told before."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    path = write(words, tmp_path / "given", pre_tokenizer={"type": "WhitespaceSplit"})
    texts = ["a b " * (number + 1) for number in range(60)]
    description = tokenised(with_tokenizer(smoke, path, texts), tmp_path / "tokens")
    assert sum(split["tokens"] for split in description["splits"].values()) == sum(2 * n + 3 for n in range(60))
    assert "'the quick brown fox' comes back as ''" in capsys.readouterr().err
    with pytest.raises(CalmError, match=r"the tokenizer cannot encode 'a c': .*\[UNK\].*; a byte-level BPE encodes"):
        tokenised(with_tokenizer(smoke, path, [*texts, "a c"]), tmp_path / "refused")
    # A template is asked what it appends with a letter that the vocabulary may lack.
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    write(
        Tokenizer(models.WordLevel({"<eos>": 0, "c": 1}, unk_token="[UNK]")),
        path.parent,
        post_processor=template | {"pair": [], "special_tokens": {}},
    )
    assert end_of_text_id(load_tokenizer(path)) == 0
