"""Which cases of a test `make test` tries; `make test-all` tries the others too."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All ``cases`` for ``parametrize``, those that are not among ``quick`` marked slow.

    Raises:
        ValueError: one of ``quick`` is no case.
    """
    cases = list(cases)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"{unknown} is not among {cases}")
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
