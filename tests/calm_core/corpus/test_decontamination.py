"""Dropping what training has seen, against n-grams counted as tuples in plain Python."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calm_core.corpus import documents as corpus_module
from calm_core.corpus.decontamination import seen_in_training
from calm_core.corpus.groups import read_groups
from calm_core.corpus.splits import HELD_OUT, SPLITS, split_of
from calm_core.corpus.tokenise import tokenise
from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer
from tests.calm_core.corpus.test_documents import files
from tests.calm_core.corpus.test_interrupted_data import BrokenOffError, break_off_after, content
from tests.calm_core.tokens.test_ngrams import random_documents, tuples, write


def counts_of(document: list[int], train: set[tuple[int, ...]]) -> tuple[int, int]:
    grams = tuples([document], 8)
    return len(grams), sum(gram in train for gram in grams)


def test_what_training_has_of_each_document(tmp_path: Path) -> None:
    """Documents that training does not have, has as a whole, has parts of, and such as are short."""
    train = random_documents(150, 900, seed=0)
    train += [[1, 2, 3, 4], list(range(500, 520))]
    held_out = {
        "validation": [
            [*train[0][:12], *range(100, 130)],
            *random_documents(40, 900, seed=1),
            *train[3:9],
            [1, 2, 3, 4],
            [2, 3, 4],  # stands in training, but not as a document
            list(range(504, 512)),
            [5, *range(504, 511)],
        ],
        # From several documents, none of which has half of it.
        "test": [[token for document in train[20:40] for token in document[:9]], [7], *random_documents(30, 3, seed=2)],
    }
    streams = {split: write(tmp_path, split, documents, 7) for split, documents in held_out.items()}
    seen = seen_in_training(streams, write(tmp_path, "train", train, 11))
    grams = set(tuples(train, 8))
    for split, documents in held_out.items():
        expected = [counts_of(document, grams) for document in documents]
        assert list(zip(seen[split].ngrams.tolist(), seen[split].in_training.tolist(), strict=True)) == expected
        assert seen[split].mostly.tolist() == [2 * there > all_ for all_, there in expected]
        assert seen[split].ngram_share == sum(there for _, there in expected) / sum(all_ for all_, _ in expected)
    assert seen["validation"].mostly.tolist()[-4:] == [True, False, True, False]
    none = seen["test"].of(np.zeros(len(held_out["test"]), bool))
    assert (none.ngram_share, none.document_share) == (0.0, 0.0)


WORDS = [
    f"{first}{second}" for first in ("ka", "lo", "mi", "nu", "pe") for second in ("ra", "so", "ti", "vu", "ze", "dy")
]


def planted(smoke: Params, tmp_path: Path, **changes: Any) -> tuple[Params, list[dict[str, str]]]:
    """A corpus of sites whose pages are random words, but for some that are copies of others', whole or cut."""
    draws = random.Random(3)
    rows: list[dict[str, str]] = []
    for number in range(700):
        text = " ".join(draws.choices(WORDS, k=draws.randrange(1, 40)))
        if number > 50 and draws.random() < 0.4:
            copied = draws.choice(rows)["text"].split()
            kept = draws.randrange(len(copied) + 1)
            text = " ".join([*copied[:kept], *text.split()[: draws.randrange(4)]]) or "ka"
        rows.append({"text": text, "site": f"site {number % 70}"})
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"split_by": "site", "validation_percent": 20.0, "test_percent": 20.0, "deduplicate": True, **changes}
    corpus = files(smoke, tmp_path / "pages.jsonl", **options)
    # Few merges, so that a page has many tokens.
    tokenizer = smoke.tokenizer.model_copy(update={"vocabulary_size": 290})
    return smoke.model_copy(update={"corpus": corpus, "tokenizer": tokenizer}), rows


def read(folder: Path, split: str) -> list[list[int]]:
    stream = TokenStream(folder, split)
    ends = stream.document_ends.tolist()
    return [stream.slice(start, end - start).tolist() for start, end in itertools.pairwise([0, *ends])]


def test_a_corpus_without_what_training_has_seen(
    tmp_path: Path, smoke: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.tokens.shards.SHARD_TOKENS", 3000)
    params, rows = planted(smoke, tmp_path)
    (tmp_path / "tokens").mkdir()
    description = tokenise(params, tmp_path / "tokens", groups=tmp_path / "groups.parquet")
    tokenizer = load_tokenizer(tmp_path / "tokens")
    end = end_of_text_id(tokenizer)
    encoded: dict[str, list[tuple[str, list[int]]]] = {split: [] for split in SPLITS}
    sites: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        token_ids = [*tokenizer.encode(row["text"]).ids, end]
        encoded[split_of(row["site"], 20.0, 20.0)].append((row["text"], token_ids))
        sites[split_of(row["site"], 20.0, 20.0)].append(row["site"])
    assert read(tmp_path / "tokens", "train") == [token_ids for _, token_ids in encoded["train"]]
    train = set(tuples([token_ids for _, token_ids in encoded["train"]], 8))
    for split in HELD_OUT:
        counted = [counts_of(token_ids, train) for _, token_ids in encoded[split]]
        stays = [2 * there <= all_ for all_, there in counted]
        left = list(itertools.compress(encoded[split], stays))
        assert len(left) < len(encoded[split]) - 10
        assert read(tmp_path / "tokens", split) == [token_ids for _, token_ids in left]
        groups = read_groups(tmp_path / "groups.parquet", split, len(left)).tolist()
        pairs = set(zip(groups, itertools.compress(sites[split], stays), strict=True))
        assert {group for group, _ in pairs} == set(range(len(pairs)))
        assert len({site for _, site in pairs}) == len(pairs) > 1
        with pytest.raises(CalmError, match=rf"is of {len(left)} documents of {split}, which has 3; run `dvc repro`"):
            read_groups(tmp_path / "groups.parquet", split, 3)
        told = description["splits"][split]
        assert (told["documents"], told["characters"]) == (len(left), sum(len(text) for text, _ in left))
        assert told["tokens"] == sum(len(token_ids) for _, token_ids in left)
        after = list(itertools.compress(counted, stays))
        assert told["seen_in_training"] == {
            "ngram_tokens": 8,
            "ngram_share_before": sum(there for _, there in counted) / sum(all_ for all_, _ in counted),
            "ngram_share_after": sum(there for _, there in after) / sum(all_ for all_, _ in after),
            "document_share_before": stays.count(False) / len(stays),
            "document_share_after": 0.0,
            "documents_dropped": stays.count(False),
        }
    names = {path.name for path in (tmp_path / "tokens").iterdir()}
    listed = {name for split in description["splits"].values() for name in split["sha256"]}
    assert names == {*listed, "tokenizer.json", "description.json"}


def test_nothing_is_dropped_unless_asked_for(tmp_path: Path, smoke: Params) -> None:
    params, rows = planted(smoke, tmp_path, deduplicate=False)
    (tmp_path / "tokens").mkdir()
    splits = tokenise(params, tmp_path / "tokens")["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(rows)
    for split in HELD_OUT:
        seen = splits[split]["seen_in_training"]
        assert seen["documents_dropped"] == 0
        assert 0.1 < seen["document_share_before"] == seen["document_share_after"] < 0.6
        assert 0.1 < seen["ngram_share_before"] == seen["ngram_share_after"] < 0.6


def test_a_stage_that_was_broken_off_drops_the_same(
    tmp_path: Path, smoke: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm_core.tokens.shards.SHARD_TOKENS", 3000)
    monkeypatch.setattr(corpus_module, "MARK_DOCUMENTS", 50)
    params, _ = planted(smoke, tmp_path)

    def run(name: str) -> dict[str, bytes]:
        (tmp_path / name).mkdir(exist_ok=True)
        kept = None if name == "whole" else FinishedFiles(tmp_path / "kept", "test")
        tokenise(params, tmp_path / name, kept, tmp_path / f"{name}.parquet")
        return content(tmp_path / name) | {"groups": (tmp_path / f"{name}.parquet").read_bytes()}

    whole = run("whole")
    with monkeypatch.context() as context:
        break_off_after(context, 7)
        with pytest.raises(BrokenOffError):
            run("parts")
    with monkeypatch.context() as context:  # and while the first split is written without some of its documents
        context.setattr("calm_core.corpus.tokenise.sha256", lambda path: (_ for _ in ()).throw(BrokenOffError))
        with pytest.raises(BrokenOffError):
            run("broken in the end")
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    break_off_after(monkeypatch, 0)  # all is encoded
    assert run("parts") == whole
    assert {path.name for path in (tmp_path / "kept").iterdir()} == kept


def test_too_little_is_left(tmp_path: Path, smoke: Params) -> None:
    rows = [{"text": f"The same words on every page, and at the end a number: {number}"} for number in range(300)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = files(smoke, tmp_path / "pages.jsonl", split_by="file", deduplicate=True)
    (tmp_path / "tokens").mkdir()
    told = {}
    for unit in ("document", "text"):
        changed = smoke.model_copy(update={"corpus": corpus.model_copy(update={"split_by": unit})})
        with pytest.raises(CalmError, match="0 tokens, too few for one block of 64 and 4 more, since") as raised:
            tokenise(changed, tmp_path / "tokens")
        told[unit] = str(raised.value)
    dropped = next(int(word) for word in told["document"].split() if word.isdigit() and word != "0")
    assert told["document"].startswith("the validation split has 0 tokens")
    assert told["document"].endswith(
        "documents were dropped, of whose 8-grams training has more than half; use more text, "
        "a larger corpus.validation_percent, corpus.deduplicate: false or a shorter context"
    )
    assert "corpus.split_by: document, corpus.deduplicate: false" in told["text"]
    assert dropped
