"""Work made ahead in a thread: in order, not too far ahead, and its errors where the result would have come."""

import threading
from collections.abc import Iterator

import pytest

from calm_core.training.ahead import made_ahead


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
