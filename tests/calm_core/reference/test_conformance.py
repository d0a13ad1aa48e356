"""Imported checkpoints give the numbers that the reference implementation gave: every recorded tensor, within 1e-4."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, Posterior, clipped_kl
from calm_core.calm.denoiser import DenoisingDraws
from calm_core.calm.energy_score import energy_score
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm
from calm_core.evaluation.brier import brier_from_samples
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import AUTOENCODER, load_model
from tests import ROOT
from tests.calm_core.reference.reference_data import DATA, KINDS, write_reference
from tests.support.threads import operators_of

SHARED = ROOT.parent / "shared/conformance"
HEADS = KINDS[1:]
OBJECTIVE = HeadObjective(samples=4, target_samples=100)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As many as the recording had: the diffusion samples reach 87 000, where float32 is 0.008 apart."""
    with operators_of(2):
        yield


@pytest.fixture(scope="module", params=["shipped", *sorted(path.name for path in SHARED.glob("k*"))])
def recorded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with an imported model for each kind, and the recorded tensors."""
    folder = tmp_path_factory.mktemp(request.param)
    for kind in KINDS:
        if request.param == "shipped":
            source = write_reference(kind, folder / "source")
        else:
            source = SHARED / request.param / kind
        import_checkpoint(source, folder / kind)
    origin = DATA if request.param == "shipped" else SHARED / request.param
    return folder, load_file(origin / "expected.safetensors")


@pytest.fixture()
def expected(recorded: tuple[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    return recorded[1]


@pytest.fixture()
def autoencoder(recorded: tuple[Path, dict[str, Tensor]]) -> Autoencoder:
    return load_model(Autoencoder, recorded[0] / "autoencoder")


@pytest.fixture(params=HEADS)
def calm(request: Any, recorded: tuple[Path, dict[str, Tensor]]) -> Calm:
    return load_model(Calm, recorded[0] / request.param)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0.0)


def patches(expected: dict[str, Tensor], model: Autoencoder | Calm) -> Tensor:
    return expected["input_ids"].unflatten(-1, (-1, model.config.patch_size))


def next_posterior(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> Posterior:
    return autoencoder.encode(patches(expected, autoencoder)[:, 1:].flatten(0, 1))


def test_autoencoder(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    posterior = autoencoder.encode(patches(expected, autoencoder))
    close(torch.cat(posterior, dim=-1), expected["ae.encoder_out"])
    close(autoencoder.logits(posterior.mean).flatten(1, 2), expected["ae.logits_of_mean"])
    close(clipped_kl(posterior, kl_clamp=0.5).mean(), expected["ae.kl_clipped"])
    noise = expected["ae.eval_eps"].view_as(posterior.mean)
    logits = autoencoder.logits(posterior.sample(noise)).flatten(0, 2)
    close(torch.nn.functional.cross_entropy(logits, expected["input_ids"].flatten()), expected["ae.eval_loss"])


def test_a_language_model_carries_the_same_autoencoder(
    recorded: tuple[Path, dict[str, Tensor]], autoencoder: Autoencoder
) -> None:
    for kind in HEADS:
        inner = load_model(Autoencoder, recorded[0] / kind / AUTOENCODER)
        assert inner.config == autoencoder.config
        for name, weight in autoencoder.state_dict().items():
            assert torch.equal(inner.state_dict()[name], weight)


def test_backbone(calm: Calm, expected: dict[str, Tensor]) -> None:
    kind, known = calm.config.head.kind, patches(expected, calm)[:, :-1]
    close(calm.patch_embedding(known), expected[f"{kind}.inputs_embeds"])
    close(calm(known), expected[f"{kind}.hidden_states"])


def test_training_loss(calm: Calm, autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    kind = calm.config.head.kind
    first, second, *rest = (expected[name] for name in sorted(expected) if name.startswith(f"{kind}.train_draw_"))
    shape = first.shape
    hidden_states, posterior = expected[f"{kind}.hidden_states"].flatten(0, 1), next_posterior(autoencoder, expected)
    if kind == "energy":
        # The reference draws targets for each position; this project shares them, see test_energy_score.
        score = energy_score(calm.head.sample(hidden_states, first - 0.5), posterior.sample(second))
        close(score.total.mean(), expected[f"{kind}.train_loss"])
        return
    draws: Any
    if kind == "diffusion":
        draws = DenoisingDraws(first, second.view(shape[:2]), rest[0].view(shape))
    else:
        draws = DenoisingDraws(first, second.view(shape[:2]), rest[0].view(shape))
    loss = calm.head.loss(hidden_states, posterior, draws, OBJECTIVE)
    close(loss.total, expected[f"{kind}.train_loss"])


def test_samples(calm: Calm, autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    kind = calm.config.head.kind
    hidden_states = expected[f"{kind}.hidden_states"]
    draws = [expected[name] for name in sorted(expected) if name.startswith(f"{kind}.sample_draw_")]
    if kind == "energy":
        noise = draws[0] - 0.5
    else:
        noise = torch.stack(draws).view(-1, *hidden_states.shape[:2], calm.config.latent_size)
        noise = noise if kind == "diffusion" else noise[0]
    samples = calm.head.sample(hidden_states, noise)
    close(samples, expected[f"{kind}.sample"])
    assert torch.equal(autoencoder.decode(samples), expected[f"{kind}.sample_tokens"])


def test_brier(autoencoder: Autoencoder, expected: dict[str, Tensor]) -> None:
    samples = autoencoder.decode(expected["energy.brier_mixed_predictions"])
    targets = expected["energy.brier_mixed_targets"].unflatten(-1, (-1, autoencoder.config.patch_size))
    scores = brier_from_samples(samples, targets).mean(dim=(0, 1))
    torch.testing.assert_close(scores, expected["energy.brier_mixed"], atol=1e-6, rtol=0.0)
