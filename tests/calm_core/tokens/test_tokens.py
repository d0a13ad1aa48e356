"""From text to tokens, patches and latents."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.corpus.splits import SPLITS, split_of
from calm_core.corpus.tokenise import tokenise
from calm_core.errors import CalmError
from calm_core.latents.distinct_patches import distinct_patches
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus, latent_bytes, save_index
from calm_core.params import Params
from calm_core.storage.atomic import whole_directory
from calm_core.storage.json_io import read_json
from calm_core.tokens.batch_encoding import encode_documents
from calm_core.tokens.shards import TokenStream, TokenWriter
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["some words to learn merges from, and some words more"] * 3, 300)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_of_encode_is_the_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def small_corpus(tmp_path: Path, params: Params, texts: list[str]) -> Params:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    changes = {"source": "files", "paths": [str(path)], "validation_percent": 20.0, "test_percent": 20.0}
    corpus = params.corpus.model_copy(update=changes | {"deduplicate": False})
    return params.model_copy(update={"corpus": corpus})


def test_tokenise_writes_every_document_once(tmp_path: Path, smoke: Params) -> None:
    texts = [f"Text number {number} of several, with some words." for number in range(200)]
    params = small_corpus(tmp_path, smoke, texts)
    folder = tmp_path / "tokens"
    folder.mkdir()
    description = tokenise(params, folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    end = end_of_text_id(tokenizer)
    for split in SPLITS:
        stream = TokenStream(folder, split)
        token_ids = stream.slice(0, len(stream)).tolist()
        pieces: list[list[int]] = [[]]
        for token_id in token_ids:
            if token_id == end:
                pieces.append([])
            else:
                pieces[-1].append(token_id)
        expected = [text for text in texts if split_of(text, 20.0, 20.0) == split]
        assert [tokenizer.decode(piece) for piece in pieces[:-1]] == expected
        counts = description["splits"][split]
        assert (counts["documents"], counts["tokens"]) == (len(expected), len(token_ids))
        assert stream.document_ends.tolist()[-1] == len(token_ids)
        assert all(token_ids[document_end - 1] == end for document_end in stream.document_ends.tolist())


def test_a_given_tokenizer_is_used(tmp_path: Path, smoke: Params) -> None:
    path = tmp_path / "given.json"
    TOKENIZER.save(str(path))
    section = smoke.tokenizer.model_copy(update={"path": str(path)})
    params = small_corpus(tmp_path, smoke, [f"text number {number}" for number in range(200)])
    folder = tmp_path / "tokens"
    folder.mkdir()
    with pytest.raises(CalmError, match=r"has 289 entries but tokenizer.vocabulary_size is 512"):
        tokenise(params.model_copy(update={"tokenizer": section}), folder)
    section = section.model_copy(update={"vocabulary_size": 289})
    assert tokenise(params.model_copy(update={"tokenizer": section}), folder)["vocabulary_size"] == 289


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizers_that_are_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalmError):
        load_tokenizer(path)


def test_a_split_without_documents(tmp_path: Path, smoke: Params) -> None:
    params = small_corpus(tmp_path, smoke, ["one single document"])
    with pytest.raises(CalmError, match="falls into the (train|validation) split"):
        tokenise(params, tmp_path)


def test_stream_reads_across_shards(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "train", 1000)
    expected: list[int] = []
    for number in range(30):
        document = list(range(number, number + 1 + number % 4))
        expected += document
        writer.write(document)
        if number % 7 == 0:
            writer.flush()
    writer.flush()
    stream = TokenStream(tmp_path, "train")
    assert len(writer.paths) == 6
    assert len(stream) == len(expected)
    for start in range(len(expected)):
        for length in (1, 5, len(expected) - start):
            end = min(start + length, len(expected))
            assert stream.slice(start, end - start).tolist() == expected[start:end]
    starts = torch.randperm(len(expected) - 6, generator=torch.Generator().manual_seed(0))
    assert stream.windows(starts, 6).tolist() == [expected[start : start + 6] for start in starts.tolist()]


@pytest.mark.parametrize("vocabulary_size", [1 << 16, 1 << 17])
def test_shards_are_cut_where_a_document_fills_them(
    tmp_path: Path, vocabulary_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.tokens.shards.SHARD_TOKENS", 50)
    monkeypatch.setattr("calm_core.tokens.shards.COPIED_TOKENS", 7)
    lengths = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(0))
    documents = [torch.arange(length) + 10 * number for number, length in enumerate(lengths.tolist())]
    shards: list[list[torch.Tensor]] = [[]]
    for document in documents:
        if sum(map(len, shards[-1])) >= 50:
            shards.append([])
        shards[-1].append(document)
    dtype = torch.uint16 if vocabulary_size == 1 << 16 else torch.int32
    ends = lengths.cumsum(0).split([len(shard) for shard in shards])

    one_by_one = TokenWriter(tmp_path, "one", vocabulary_size)
    for document in documents:
        one_by_one.write(document.tolist())
    batches = TokenWriter(tmp_path, "batch", vocabulary_size)
    for start in range(0, 60, 25):
        batch = documents[start : start + 25]
        batches.write_documents(torch.cat(batch).numpy(), np.array([len(document) for document in batch]))
    for writer in (one_by_one, batches):
        writer.flush()
        assert (writer.documents, writer.tokens, len(writer.paths)) == (60, int(lengths.sum()), len(shards))
        for path, shard, shard_ends in zip(writer.paths, shards, ends, strict=True):
            expected = save({"token_ids": torch.cat(shard).to(dtype), "document_ends": shard_ends.clone()})
            assert path.read_bytes() == expected


def test_documents_are_encoded_as_one_by_one_and_read_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_core.tokens.batch_encoding.BATCH_DOCUMENTS", 5)
    monkeypatch.setattr("calm_core.tokens.batch_encoding.BATCH_CHARACTERS", 60)
    texts = ["words " * (number % 7) for number in range(40)]
    end = end_of_text_id(TOKENIZER)
    read: list[str] = []
    found: list[tuple[str, list[int]]] = []
    for batch in encode_documents(TOKENIZER, (read.append(text) or text for text in texts)):
        assert len(batch.texts) <= 5
        assert sum(map(len, batch.texts[:-1])) < 60
        found += [(text, token_ids.tolist()) for text, token_ids in batch.documents()]
        assert len(read) <= len(found) + 2 * 5
    assert found == [(text, [*TOKENIZER.encode(text).ids, end]) for text in texts]


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="holds no train tokens"):
        TokenStream(tmp_path, "train")
    (tmp_path / "train-00000.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CalmError, match="damaged"):
        TokenStream(tmp_path, "train")


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 5))
def test_distinct_patches_rebuild_the_stream(token_ids: list[int], patch_size: int) -> None:
    patches, patch_index = distinct_patches(torch.tensor(token_ids, dtype=torch.int64), patch_size)
    whole = len(token_ids) // patch_size * patch_size
    assert patches[patch_index.long()].flatten().tolist() == token_ids[:whole]
    assert len({tuple(patch) for patch in patches.tolist()}) == len(patches)


def autoencoder() -> Autoencoder:
    model = Autoencoder(AutoencoderConfig(20, 3, 16, 24, 8))
    model.initialise(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def stream_of(tmp_path: Path, token_ids: torch.Tensor) -> TokenStream:
    writer = TokenWriter(tmp_path, "train", 20)
    writer.write(token_ids.tolist())
    writer.flush()
    return TokenStream(tmp_path, "train")


def test_latents_are_the_posteriors_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_core.latents.encode.SHARD_PATCHES", 16)
    monkeypatch.setattr("calm_core.latents.shards.SHARD_PATCHES", 16)
    model = autoencoder()
    token_ids = torch.randint(4, (301,), generator=torch.Generator().manual_seed(1))
    counts = encode_corpus(model, stream_of(tmp_path, token_ids), tmp_path, "float32")
    assert counts.patches == 100
    assert 16 < counts.distinct < 64
    latents = LatentCorpus(tmp_path)
    assert len(latents) == 100
    positions = torch.tensor([[0, 99], [17, 3]])
    posterior = latents.posterior(positions)
    expected = model.encode(token_ids[:300].view(100, 3)[positions])
    torch.testing.assert_close(posterior.mean, expected.mean, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.log_std, expected.log_std, atol=2e-3, rtol=1e-3)


def test_more_distinct_patches_than_int32_counts(tmp_path: Path) -> None:
    for distinct, dtype in ((1 << 31, torch.int32), ((1 << 31) + 1, torch.int64)):
        save_index([np.array([0, distinct - 2]), np.array([distinct - 1])], 3, distinct, tmp_path)
        index = load_file(tmp_path / "index.safetensors")["patches"]
        assert index.dtype == dtype
        assert index.tolist() == [0, distinct - 2, distinct - 1]
        assert latent_bytes(distinct, 3, 8) == distinct * 32 + index.nbytes


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CalmError, match="the latents need 0 MB .* but 0 MB are free"):
        encode_corpus(autoencoder(), stream_of(tmp_path, torch.arange(18)), tmp_path, "float32")


def test_whole_directory_replaces_or_leaves(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole_directory(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(ValueError, match="halfway"), whole_directory(target) as folder:
        (folder / "a").write_text("second")
        raise ValueError("halfway")
    assert (target / "a").read_text() == "first"
    with whole_directory(target) as folder:
        (folder / "b").write_text("third")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_read_json_errors(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(CalmError, match="is damaged"):
        read_json(tmp_path / "a.json")
