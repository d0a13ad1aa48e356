"""Work in threads of this process: ahead of who waits for it, and side by side without barriers.

A small model's pass has thousands of operators too small to be worth two threads: each would end in a barrier, where
one thread waits for the other, and on a busy machine waits for a time slice of the scheduler. Side by side, each thread
takes work of its own through operators of one thread, and they meet when it is done. Results keep the order of the
work; what each is does not depend on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

Key = TypeVar("Key")
Made = TypeVar("Made")

LARGEST_SIDE_BY_SIDE = 1 << 25
"""Parameters of a model that threads use side by side, at most: the operators of a larger one are worth several
threads, and in training each thread has gradients of its own."""

MOST_SIDE_BY_SIDE = 8
"""Threads side by side at most: Python's part of their work runs in one of them at a time."""


def threads_side_by_side(device: torch.device, *models: nn.Module) -> int:
    """How many threads of ``device`` are worth working side by side on ``models``: 1 unless it is a CPU and they are
    small."""
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    if device.type != "cpu" or parameters > LARGEST_SIDE_BY_SIDE:
        return 1
    return min(torch.get_num_threads(), MOST_SIDE_BY_SIDE)


@contextmanager
def operators_of_one_thread() -> Iterator[None]:
    """Context in which operators have one thread, in this thread and those that begin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    work: Callable[[Key], Made], keys: Iterable[Key], device: torch.device, *models: nn.Module
) -> Iterator[Made]:
    """``work(key)``, which uses ``models`` without gradients, for each of ``keys``, in their order.

    Several at a time where ``threads_side_by_side`` says so. Settings of a thread, as autocast, are ``work``'s own.
    """
    work = torch.no_grad()(work)
    threads = threads_side_by_side(device, *models)
    if threads == 1:
        yield from map(work, keys)
        return
    with operators_of_one_thread():
        yield from made_ahead(work, keys, 2 * threads, threads)


def made_ahead(make: Callable[[Key], Made], keys: Iterable[Key], depth: int = 2, threads: int = 1) -> Iterator[Made]:
    """``make(key)`` for each of ``keys``, in their order; ``threads`` are ``depth`` of them ahead at most.

    An error of ``make`` is raised where its result would have come. Closing the iterator ends the threads.
    """
    remaining, waiting = iter(keys), deque[Future[Made]]()
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting.extend(pool.submit(make, key) for key in islice(remaining, depth))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, key) for key in islice(remaining, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()
