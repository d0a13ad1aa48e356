"""A corpus ten or twenty times as large as the memory that tokenising and encoding may take for it.

What is in memory at a time is a matter of constants (a batch of documents, a piece of a file, a
partition of patches): they are made small here, and so are the limit and the corpus. A first run over a small corpus
lets every library load and start its threads; from then on the process may have a few MB of data more, twice what the
stages were seen to need (1 to 2 MB and 2 to 3 MB). Whoever holds all texts (40 MB) or token ids (8 MB at two bytes
each) exceeds the 4 MB of tokenising; whoever holds all token ids (120 MB), distinct patches (25 MB), posteriors
(12 MB) or numbers of patches (7 MB) the 6 MB of encoding.
"""

import gzip
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch

import calm_core.corpus.plain_text
import calm_core.latents.distinct_patches
import calm_core.latents.encode
import calm_core.latents.shards
import calm_core.tokens.batch_encoding
import calm_core.tokens.shards
from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.corpus.tokenise import tokenise
from calm_core.latents.encode import encode_corpus
from calm_core.params import Params
from calm_core.presets import load_preset
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.shards import TokenStream, TokenWriter
from tests import needs_linux
from tests.reliability.support.faults import limit_data

pytestmark = needs_linux

TEXT, TOKENS = 40 << 20, 120 << 20
"""Characters to tokenise and bytes of token ids to encode."""
TO_TOKENISE, TO_ENCODE = 4 << 20, 6 << 20
"""Bytes of data beside what the process has after the first corpus."""
PATCH_SIZE, DISTINCT = 64, 100_000


def in_a_process(work: Callable[[Path], None], folder: Path) -> None:
    """Run ``work`` on ``folder`` in a process of its own, which must end well."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def small_constants() -> None:
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # Arrow's own takes memory by the megabyte
    calm_core.corpus.plain_text.PIECE_BYTES = 1 << 16
    calm_core.tokens.batch_encoding.BATCH_CHARACTERS = 1 << 15
    calm_core.tokens.shards.SHARD_TOKENS = 1 << 19
    calm_core.tokens.shards.COPIED_TOKENS = 1 << 14
    calm_core.latents.distinct_patches.CHUNK_PATCHES = calm_core.latents.distinct_patches.PARTITION_PATCHES = 1 << 10
    calm_core.latents.encode.ENCODING_BATCH = 1 << 7
    calm_core.latents.encode.SHARD_PATCHES = calm_core.latents.shards.SHARD_PATCHES = 1 << 15


def corpus(params: Params, path: Path, characters: int) -> tuple[Params, int]:
    """A compressed file of at least so many ``characters``, a document a line; and how many documents it holds."""
    draws = random.Random(0)
    # Few and long words make quick work for a tokenizer, and still a token each.
    words = ["".join(draws.choices("abcdefghijklmnop", k=3)) * 3 for _ in range(60)]
    lines = "".join(" ".join(draws.choices(words, k=60)) + "\n" for _ in range(500))
    times = -(-characters // len(lines))
    path.write_bytes(gzip.compress(lines.encode()) * times)
    source: dict[str, Any] = {"source": "files", "paths": [str(path)], "text_unit": "line", "documents": None}
    return params.model_copy(update={"corpus": params.corpus.model_copy(update=source)}), 500 * times


def tokenise_within(folder: Path) -> None:
    small_constants()
    params = load_preset("smoke")
    params = params.model_copy(update={"tokenizer": params.tokenizer.model_copy(update={"vocabulary_size": 800})})
    for name, characters in (("first", 3 << 20), ("large", TEXT)):
        path = folder / name
        path.mkdir()
        reading, documents = corpus(params, folder / f"{name}.txt.gz", characters)
        if name == "large":
            limit_data(TO_TOKENISE)
        splits = tokenise(reading, path, FinishedFiles(folder / f"{name} kept", "test"))["splits"]
        assert sum(split["documents"] for split in splits.values()) == documents
        assert sum(split["characters"] for split in splits.values()) >= characters - documents
    assert len(splits["train"]["sha256"]) > 3
    assert len(TokenStream(path, "train")) == splits["train"]["tokens"]
    assert 2 * splits["train"]["tokens"] > 1.5 * TO_TOKENISE


def write_tokens(folder: Path, size: int) -> None:
    """Tokens of ``size`` bytes, patches that repeat themselves."""
    draws = np.random.default_rng(0)
    patches = draws.integers(0, 1000, (DISTINCT, PATCH_SIZE)).astype(np.uint16)
    writer = TokenWriter(folder, "train", 1000)
    while writer.tokens * 2 < size:
        token_ids = patches[draws.integers(0, DISTINCT, 2048)].ravel()
        writer.write_documents(token_ids, np.full(64, len(token_ids) // 64))
    writer.flush()


def encode_within(folder: Path) -> None:
    small_constants()
    model = Autoencoder(AutoencoderConfig(1000, PATCH_SIZE, 8, 12, 32))
    model.initialise(torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    for name in ("first", "large"):
        path, tokens = folder / name, TokenStream(folder / name, "train")
        if name == "large":
            limit_data(TO_ENCODE)
        counts = encode_corpus(model, tokens, path, "float32", FinishedFiles(folder / f"{name} kept", "test"))
        assert counts.patches == len(tokens) // PATCH_SIZE
    assert 2 * PATCH_SIZE * counts.patches >= TOKENS
    assert 0.95 * DISTINCT < counts.distinct <= DISTINCT


def test_tokenising(tmp_path: Path) -> None:
    in_a_process(tokenise_within, tmp_path)


@pytest.mark.slow
def test_encoding(tmp_path: Path) -> None:
    for name, size in (("first", 8 << 20), ("large", TOKENS)):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name, size)
    in_a_process(encode_within, tmp_path)
