"""Work in threads: in order, not too far ahead, its errors where the result would have come; and side by side."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from calm_core.runtime import threads as of_process
from calm_core.runtime.threads import made_ahead, side_by_side, threads_side_by_side
from tests.support.threads import operators_of

CPU = torch.device("cpu")


def test_order_and_depth() -> None:
    begun: list[int] = []

    def keys() -> Iterator[int]:
        for key in range(9):
            begun.append(key)
            yield key

    made = made_ahead(lambda key: (key, threading.current_thread() is threading.main_thread()), keys(), depth=2)
    for number, (key, in_main_thread) in enumerate(made):
        assert key == number
        assert not in_main_thread
        assert len(begun) <= number + 3
    assert number == 8


def test_an_error_comes_in_its_place() -> None:
    made = made_ahead(lambda key: 6 // key, [3, 2, 1, 0, 5])
    assert [next(made) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    made = made_ahead(abs, range(100))
    assert next(made) == 0
    assert threading.active_count() == before + 1
    made.close()
    assert threading.active_count() == before


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with operators_of(request.param) as threads:
        yield threads


def test_threads_work_side_by_side_in_operators_of_one(threads: int) -> None:
    model, together = nn.Linear(2, 2), threading.Barrier(threads)

    def work(key: int) -> tuple[int, int, bool]:
        # Passed by as many threads as there should be, and by no fewer.
        together.wait(timeout=30)
        return key, torch.get_num_threads(), torch.is_grad_enabled()

    found = list(side_by_side(work, range(12), CPU, model))
    assert found == [(key, 1, False) for key in range(12)]
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_large_models_and_devices_have_all_threads_to_themselves(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    assert threads_side_by_side(CPU, model, model) == threads
    assert threads_side_by_side(torch.device("cuda"), model) == 1
    monkeypatch.setattr(of_process, "LARGEST_SIDE_BY_SIDE", 11)
    assert threads_side_by_side(CPU, model) == threads
    assert threads_side_by_side(CPU, model, model) == 1
    alone = list(side_by_side(lambda key: (key, torch.get_num_threads()), range(3), CPU, model, model))
    assert alone == [(key, threads) for key in range(3)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert threads_side_by_side(CPU, model) == 8
