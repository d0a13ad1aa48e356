"""The yardsticks of the data stages do the work that they are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import generation
from benchmarks.default_corpus import DefaultCorpus, default_corpus
from benchmarks.encoding import encode_every_patch
from benchmarks.synthetic_text import synthetic_documents
from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.costs.flops import calm_flops
from calm_core.inference import equal_patches
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


def test_flops_of_a_sharpened_patch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calm, autoencoder, weights = generation.models()
    assert weights == "random"
    # Head: (noise 64 + latent 64) * 128 + 2 * 128^2 + 2 blocks of 6 * 128^2.
    head = (64 + 64) * 128 + 2 * 128**2 + 2 * 6 * 128**2
    # Decoder: from the latent and a layer on the patch; expand, a layer and the logits at each position.
    of_patch = 64 * 96 + 3 * 96 * 192
    of_position = 96 * 96 + 3 * 96 * 192 + 96 * 4096
    plain = calm_flops(calm.config, autoencoder.config, 16, 1).inference_per_token * 4
    added = (generation.times_the_flops(calm, autoencoder, 200, 1.5) - 1) * plain
    assert added == pytest.approx(2 * (199 * head + 200 * (of_patch + 1.5 * of_position)))


def test_positions_decoded_are_those_that_are_looked_at() -> None:
    model = Autoencoder(AutoencoderConfig(5, 3, 16, 24, 8))
    model.initialise(torch.Generator().manual_seed(0))
    real, latents = equal_patches.tokens_at, torch.zeros(4, 2, 8)
    # All of a row are equal, so that none is done before its last position; of one latent there is nothing to compare.
    assert generation.positions_decoded(lambda: equal_patches.equal_patches(model, latents)) == 4 * 2 * 3
    assert generation.positions_decoded(lambda: equal_patches.equal_patches(model, latents[:1])) == 2
    assert equal_patches.tokens_at is real
