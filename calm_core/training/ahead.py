"""Work done ahead in a thread: a GPU's next batch is read, drawn and copied while it computes the present one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Key], Made], keys: Iterable[Key], depth: int = 2) -> Iterator[Made]:
    """``make(key)`` for each of ``keys``, in their order; a thread is ``depth`` of them ahead at most.

    An error of ``make`` is raised where its result would have come. Closing the iterator ends the thread.
    """
    remaining, waiting = iter(keys), deque[Future[Made]]()
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting.extend(pool.submit(make, key) for key in islice(remaining, depth))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, key) for key in islice(remaining, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()
