"""How many threads torch gets, and what happens where the C library is not glibc."""

import ctypes
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import calm_core.runtime.precision as precision
from calm_core.runtime.precision import has_bfloat16, set_threads, uses_bfloat16


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three_processors(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(precision, "available_processors", lambda: 3)
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_as_many_as_there_are_processors(three_processors: pytest.MonkeyPatch) -> None:
    assert set_threads("auto") == 3
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("processes", "threads"), [(1, 3), (2, 1), (3, 1), (8, 1)])
def test_processes_share_the_processors(three_processors: pytest.MonkeyPatch, processes: int, threads: int) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", str(processes))):
        three_processors.setenv(name, value)
    assert set_threads("auto") == threads
    three_processors.setenv("OMP_NUM_THREADS", "2")  # the user's word, for each process as OpenMP takes it
    assert set_threads("auto") == 2


@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("2", 2), ("4", 4), (" 4 ", 4), ("4,2", 4), ("", 3), ("0", 3), ("-2", 3), ("two", 3), ("2.5", 3),
     ("9" * 30, 3), ("²", 3)],
)  # fmt: skip
def test_omp_num_threads_is_heeded(three_processors: pytest.MonkeyPatch, value: str, threads: int) -> None:
    three_processors.setenv("OMP_NUM_THREADS", value)
    assert set_threads("auto") == threads
    assert torch.get_num_threads() == threads


def test_a_number_in_params_wins(three_processors: pytest.MonkeyPatch) -> None:
    three_processors.setenv("OMP_NUM_THREADS", "4")
    assert set_threads(2) == 2
    assert torch.get_num_threads() == 2


class Libc:
    """A C library that notes calls of mallopt."""

    calls: list[tuple[int, int]]

    def __init__(self, name: str | None) -> None:
        Libc.calls = []

    def mallopt(self, option: int, value: int) -> int:
        Libc.calls.append((option, value))
        return 1


def test_freed_memory_is_kept_by_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Libc)
    precision.keep_freed_memory()
    # By glibc's malloc.h: mmap threshold, trim threshold, top pad; an option's value is an int.
    assert [option for option, _ in Libc.calls] == [-3, -1, -2]
    assert all(0 < value < 2**31 for _, value in Libc.calls)


@pytest.mark.parametrize("missing", [AttributeError("dlsym: symbol not found"), OSError("no such image")])
def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, missing: Exception) -> None:
    """macOS's and musl have no mallopt; a static build has nothing to look it up in."""

    class Other:
        def __init__(self, name: str | None) -> None:
            if isinstance(missing, OSError):
                raise missing

        def __getattr__(self, name: str) -> Any:
            raise missing

    monkeypatch.setattr(ctypes, "CDLL", Other)
    precision.keep_freed_memory()
    assert set_threads(1) == 1


ARM = {"architecture": "arm64", "neon": True, "bf16": True, "sve": True, "sve_bf16": True, "sve_max_length": 256}
ZEN_4 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_tile": False}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_tile": True, "amx_bf16": True}
ZEN_2 = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_tile": False}


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch asks the processor in C++")
@pytest.mark.parametrize(
    ("capabilities", "fast"), [(ARM, False), (ZEN_4, True), (SAPPHIRE_RAPIDS, True), (ZEN_2, False)]
)
def test_bfloat16_where_it_is_known_to_be_fast(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert has_bfloat16(cpu) is fast
    assert uses_bfloat16("auto", cpu) is fast
    assert uses_bfloat16("bfloat16", cpu)
    assert not uses_bfloat16("float32", cpu)


def test_the_number_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= set_threads("auto") <= (os.cpu_count() or math.inf)
