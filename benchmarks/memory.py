"""Peak memory of the tokenise and encode stages, in processes of their own, on a corpus, 4 and 16 times as much of it.

The whole process is counted, with its libraries. Flat means that what a stage holds has a bound. The shortest corpus is
about long enough to reach it: twenty of the pieces in which a text file is read, and two of the partitions of
``patch_index``. The patches are random, so that hardly any two are the same: the most that could be held.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch

from benchmarks.measure import Memory, Result, peak_memory
from benchmarks.synthetic_text import synthetic_documents
from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.training import autoencoder_config
from calm_core.corpus.tokenise import tokenise
from calm_core.latents.encode import encode_corpus
from calm_core.params import Params, load_params
from calm_core.presets import load_preset
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream, TokenWriter
from calm_core.tokens.tokenizer import train_tokenizer

TIMES = (1, 4, 16)
DOCUMENTS, PATCHES = 32_000, 1 << 19
"""Of the shortest corpus: documents of synthetic text (20 MB), the same again in the longer ones, and patches."""
FLAT = 1.25
"""What the peak may grow by while the corpus grows 16-fold and still count as flat; a convention of ours."""


def stage_memory() -> list[Result]:
    """The tokenise stage on a text file, and the encode stage with the autoencoder of the smoke preset."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        return [
            _flat("tokenise stage, peak memory", "documents", DOCUMENTS, lambda size: _tokenise_peak(folder, size)),
            _flat("encode_corpus stage, peak memory", "patches", PATCHES, lambda size: _encode_peak(folder, size)),
        ]


def _flat(name: str, unit: str, smallest: int, peak: Callable[[int], Memory]) -> Result:
    sizes = [smallest * times for times in TIMES]
    measured = [peak(size) for size in sizes]
    peaks = [memory.highest for memory in measured]
    details = {unit: sizes, "bytes": peaks, "bytes_added": [memory.added for memory in measured]}
    yardstick = f"the same on 1/{TIMES[-1]} of the corpus"
    return Result(name, yardstick, peaks[-1] / peaks[0], "times the memory", "<=", FLAT, details)


def _tokenise_peak(folder: Path, documents: int) -> Memory:
    texts = synthetic_documents(min(documents, DOCUMENTS))
    text, tokenizer_path, tokens = folder / "text.txt", folder / "tokenizer.json", folder / f"tokens-{documents}"
    with text.open("w", encoding="utf-8") as file:
        for _ in range(0, documents, len(texts)):
            file.write("\n".join(texts) + "\n")
    tokens.mkdir()
    params = load_params()
    train_tokenizer(texts, params.tokenizer.vocabulary_size).save(str(tokenizer_path))
    source = {"source": "files", "paths": [str(text)], "text_unit": "line", "documents": None}
    changes = {
        "corpus": params.corpus.model_copy(update=source),
        "tokenizer": params.tokenizer.model_copy(update={"path": str(tokenizer_path)}),
    }
    return peak_memory(_tokenise, params.model_copy(update=changes), tokens)


def _tokenise(params: Params, folder: Path) -> None:
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, redirect_stderr(nothing):
        tokenise(params, folder)


def _encode_peak(folder: Path, patches: int) -> Memory:
    params = load_preset("smoke")
    tokens, latents = folder / f"patches-{patches}", folder / f"latents-{patches}"
    tokens.mkdir()
    latents.mkdir()
    vocabulary_size, patch_size = params.tokenizer.vocabulary_size, params.autoencoder.patch_size
    writer, draws = TokenWriter(tokens, "train", vocabulary_size), generator(0, "benchmarks")
    for _ in range(0, patches, PATCHES):
        writer.write(torch.randint(vocabulary_size, (PATCHES * patch_size,), generator=draws).numpy())
    writer.flush()
    return peak_memory(_encode, params, tokens, latents)


def _encode(params: Params, tokens: Path, latents: Path) -> None:
    set_threads(params.runtime.threads)
    model = Autoencoder(autoencoder_config(params.autoencoder, params.tokenizer.vocabulary_size))
    model.initialise(generator(0, "benchmarks"))
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, redirect_stderr(nothing):
        encode_corpus(model.eval(), TokenStream(tokens, "train"), latents, params.runtime.precision)
