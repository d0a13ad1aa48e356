"""The yardsticks of the data stages do the work that they are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import generation
from benchmarks.default_corpus import DefaultCorpus, default_corpus
from benchmarks.encoding import encode_every_patch
from benchmarks.synthetic_text import synthetic_documents
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus
from calm_core.presets import load_preset
from calm_core.storage.tensors import load_tensors
from tests import ROOT


@pytest.fixture()
def corpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[DefaultCorpus]:
    monkeypatch.chdir(ROOT)
    with default_corpus(load_preset("smoke"), documents=400) as corpus:
        yield corpus


def test_every_patch_has_the_posterior_that_the_stage_gives_its_copies(corpus: DefaultCorpus) -> None:
    folders = [corpus.folder / name for name in ("stage", "every")]
    for folder in folders:
        folder.mkdir()
    counts = encode_corpus(corpus.autoencoder, corpus.train, folders[0], "float32")
    encode_every_patch(corpus.autoencoder, corpus.train, folders[1], "float32")
    assert counts.distinct < counts.patches
    stage = LatentCorpus(folders[0]).posterior(torch.arange(counts.patches))
    every = load_tensors(folders[1] / "posteriors-00000.safetensors")
    torch.testing.assert_close(every["mean"].float(), stage.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(every["log_std"].float(), stage.log_std, atol=2e-3, rtol=2e-3)


def test_synthetic_text_follows_zipfs_law() -> None:
    texts = synthetic_documents(200)
    assert texts[:10] == synthetic_documents(200)[:10]
    words = " ".join(texts).split()
    assert len(words) == 200 * 100
    counts = sorted((words.count(word) for word in set(words[:200])), reverse=True)
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.25)


def test_a_sharpened_patch_costs_a_sample_more_for_each_draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calm, autoencoder, weights = generation.models()
    assert weights == "random"
    one, two, many = (generation._flops_of_a_patch(calm, autoencoder, draws) for draws in (1, 2, 200))
    assert many - one == pytest.approx(199 * (two - one))
    # Head: (noise 64 + latent 64) * 128 + 2 * 128^2 + 2 blocks of 6 * 128^2; decoder: its layers and 4 * 96 * 4096.
    head = (64 + 64) * 128 + 2 * 128**2 + 2 * 6 * 128**2
    decoder = 64 * 96 + 3 * 96 * 192 + 96 * 4 * 96 + 4 * 3 * 96 * 192 + 4 * 96 * 4096
    assert two - one == 2 * (head + decoder)
