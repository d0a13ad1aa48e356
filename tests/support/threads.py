"""Operators of a given number of threads, and of as many as before afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def operators_of(threads: int) -> Iterator[int]:
    """Context in which torch's operators have ``threads`` threads, which it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
