"""Uniform numbers in float64, also of a device that has none."""

from collections.abc import Iterator

import pytest
import torch
from scipy.stats import kstest

from calm_core.evaluation.continuations import sample_tokens
from calm_core.runtime import float64
from calm_core.runtime.float64 import float64_device, uniform
from tests.support.pretend_device import PretendDevice, pretend_device


@pytest.fixture()
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    monkeypatch.setattr(float64, "WITHOUT_FLOAT64", ("meta",))
    with pretend_device(float64=False) as pretend:
        yield pretend


def test_where_float64_is() -> None:
    places = {kind: str(float64_device(torch.device(kind))) for kind in ("cpu", "cuda", "mps")}
    assert places == {"cpu": "cpu", "cuda": "cuda", "mps": "cpu"}


def test_numbers_of_the_cpu_are_torchs_own() -> None:
    found = uniform((3, 2), torch.Generator().manual_seed(0))
    expected = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(found, expected)


def test_numbers_without_float64(without: PretendDevice) -> None:
    found = uniform((20_000,), torch.Generator(without.device).manual_seed(0))
    assert (found.device.type, found.dtype) == ("cpu", torch.float64)
    assert 0 <= found.min() < found.max() < 1
    assert kstest(found.numpy(), "uniform").pvalue > 1e-4
    # The first 24 binary digits are those of a float32 draw; those below are uniform too.
    high = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal((found * 2**24).floor(), high.double() * 2**24)
    assert kstest(((found * 2**24) % 1).numpy(), "uniform").pvalue > 1e-4


def test_tokens_without_float64_follow_their_probabilities(without: PretendDevice) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2], device=without.device).expand(8000, -1)
    found = sample_tokens(probabilities, torch.Generator(without.device).manual_seed(0))
    assert found.device == without.device
    shares = torch.bincount(found.cpu(), minlength=4) / len(found)
    assert shares[1] == 0
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), rtol=0, atol=0.025)
