"""Generators and streams that are keyed by what they are for."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from calm_core.runtime.randomness import StepStreams, generator, philox_words, to_normal, to_uniform

KEY = (0x123456789ABCDEF0, 0xFEDCBA9876543210)


def test_generators_depend_on_their_purpose_alone() -> None:
    def draw(*purpose: str | int) -> float:
        return torch.rand(1, generator=generator(*purpose)).item()  # type: ignore[arg-type]

    assert draw(0, "noise", 7) == draw(0, "noise", 7)
    assert len({draw(0, "noise", 7), draw(1, "noise", 7), draw(0, "noise", 8), draw(0, "data", 7)}) == 4


@pytest.mark.parametrize("step", [0, 5, 1 << 40])
@pytest.mark.parametrize("count", [1, 8, 101])
def test_words_of_torch_are_those_of_numpy(step: int, count: int) -> None:
    rows = range((1 << 33) - 2, (1 << 33) + 2)
    found = philox_words(KEY, step, rows, count, "cpu")
    assert found.dtype == torch.int32
    for row, words in zip(rows, found, strict=True):
        stream = np.random.Philox(counter=np.array([0, row, step, 0], np.uint64), key=np.array(KEY, np.uint64))
        expected = stream.random_raw(-(-count // 2)).view(np.int32)[:count]
        assert words.tolist() == expected.tolist()


def test_a_device_draws_the_bits_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, taken on the CPU."""
    by_numpy = StepStreams(1, "stage", 3, range(2, 5))
    expected = by_numpy.uniform("u", 3, 5), by_numpy.normal("n", 7), by_numpy.shared_normal("s", 4)
    by_torch = StepStreams(1, "stage", 3, range(2, 5))
    by_torch._device = torch.device("cuda")  # which is on no machine without one
    monkeypatch.setattr("calm_core.runtime.randomness.philox_words", lambda *now: philox_words(*now[:-1], "cpu"))
    found = by_torch.uniform("u", 3, 5), by_torch.normal("n", 7), by_torch.shared_normal("s", 4)
    for values, same in zip(found, expected, strict=True):
        assert torch.equal(values, same)


def test_a_stream_is_that_of_its_seed_stage_name_step_and_row() -> None:
    def drawn(seed: int = 0, stage: str = "a", step: int = 1, row: int = 2, name: str = "n") -> tuple[float, ...]:
        return tuple(StepStreams(seed, stage, step, range(row, row + 1)).uniform(name, 4)[0].tolist())

    others = [drawn(seed=1), drawn(stage="b"), drawn(step=2), drawn(row=1), drawn(name="m"), drawn(step=2, row=1)]
    # Beyond 32 bits, of which torch's CPU generator keeps no more.
    others += [drawn(step=1 + (1 << 32)), drawn(row=2 + (1 << 32)), drawn(seed=1 << 32)]
    assert drawn() == drawn()
    assert len({drawn(), *others}) == 1 + len(others)
    whole = StepStreams(0, "a", 1, range(6)).normal("n", 3, 3)
    assert torch.equal(StepStreams(0, "a", 1, range(2, 5)).normal("n", 3, 3), whole[2:5])


def test_shared_numbers_are_the_same_for_any_rows() -> None:
    first, second = (StepStreams(0, "a", 1, rows).shared_normal("s", 3, 2) for rows in (range(2), range(7, 9)))
    assert torch.equal(first, second)
    assert first.shape == (3, 2)


def test_distributions() -> None:
    streams = StepStreams(3, "stage", 0, range(4))
    uniform, normal = streams.uniform("u", 20_000), streams.normal("n", 20_001)
    assert scipy.stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 0.001
    assert scipy.stats.kstest(normal.flatten().numpy(), "norm").pvalue > 0.001
    # The two numbers that Box and Muller make of one pair, and neighbouring rows.
    for first, second in ((normal[:, :10_000], normal[:, 10_001:20_001]), (normal[0], normal[1])):
        for power in (1, 2):
            paired = scipy.stats.pearsonr(first.flatten().numpy() ** power, second.flatten().numpy() ** power)
            assert paired.pvalue > 0.001


def test_extreme_words_give_finite_numbers() -> None:
    words = torch.tensor([0, 1, 127, 128, 0x7FFFFFFF, -1, -(1 << 31)], dtype=torch.int32)
    uniform = to_uniform(words)
    assert uniform.min() == 0
    assert uniform.max() == 1 - 2**-24
    normal = to_normal(torch.cartesian_prod(words, words))
    assert normal.isfinite().all()
    assert float(normal.abs().max()) == pytest.approx(math.sqrt(-2 * math.log(0.5 / 2**31)))
