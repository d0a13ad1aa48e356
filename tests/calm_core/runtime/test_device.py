"""The device that a run gets, on machines of every kind."""

from typing import Any

import pytest
import torch

from calm_core.errors import CalmError
from calm_core.params import Params, parse_params
from calm_core.runtime import machine
from calm_core.runtime.device import DeviceName, choose_device, device_of
from calm_core.runtime.precision import autocast, uses_bfloat16
from calm_core.runtime.process_group import joined

Machine = Any
"""What sets up a machine with some GPUs and processes."""


@pytest.fixture()
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def set_up(gpus: int = 0, apple: bool = False, processes: int = 1, here: int | None = None, rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
        if processes > 1:
            here = here or processes
            for name, value in {
                "RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here
            }.items():  # fmt: skip
                monkeypatch.setenv(name, str(value))

    current: list[torch.device] = []
    set_up.current = current  # type: ignore[attr-defined]
    return set_up


@pytest.mark.parametrize(
    ("there", "name", "chosen"),
    [
        ({}, "auto", "cpu"),
        ({"gpus": 1}, "auto", "cuda:0"),
        ({"apple": True}, "auto", "mps"),
        ({"gpus": 1, "apple": True}, "cpu", "cpu"),
        ({"gpus": 2}, "cuda", "cuda:0"),
        ({"apple": True}, "mps", "mps"),
        # Each process has a GPU of its machine, which may have fewer processes than the run.
        ({"gpus": 4, "processes": 4, "rank": 3}, "auto", "cuda:3"),
        ({"gpus": 2, "processes": 4, "here": 2, "rank": 3}, "cuda", "cuda:1"),
        # Apple's GPU is one, so several processes share the CPU.
        ({"apple": True, "processes": 2}, "auto", "cpu"),
        ({"gpus": 1, "processes": 2}, "cpu", "cpu"),
    ],
)
def test_choice(there: dict[str, Any], name: DeviceName, chosen: str, on_machine: Machine) -> None:
    on_machine(**there)
    device = choose_device(name)
    assert str(device) == chosen
    assert on_machine.current == ([device] if device.type == "cuda" else [])


@pytest.mark.parametrize(
    ("there", "name", "told"),
    [
        ({}, "cuda", "runtime.device is cuda, but torch finds no CUDA device"),
        ({}, "mps", "runtime.device is mps, but torch finds no GPU of Apple's; use cpu or auto"),
        ({"gpus": 2, "processes": 4}, "cuda", "4 processes on this machine need a GPU each, and it has 2; start 2"),
        ({"gpus": 2, "processes": 4}, "auto", "4 processes on this machine need a GPU each, and it has 2; start 2"),
        ({"apple": True, "processes": 2}, "mps", "which is one device, but there are 2 processes; use one, or cpu"),
    ],
)
def test_a_device_that_is_not_there(there: dict[str, Any], name: DeviceName, told: str, on_machine: Machine) -> None:
    on_machine(**there)
    with pytest.raises(CalmError, match=told) as refused:
        choose_device(name)
    assert "\n" not in str(refused.value)


def test_the_setting_is_named() -> None:
    with pytest.raises(CalmError, match="--device is "):
        choose_device("mps" if torch.cuda.is_available() else "cuda", "--device")


def test_one_process_computes_on_the_device_chosen(on_machine: Machine) -> None:
    on_machine(apple=True)
    with joined("auto") as processes:
        assert (processes.count, processes.device.type) == (1, "mps")


def test_params_refuse_several_processes_on_mps(values: dict[str, Any]) -> None:
    values["runtime"].update(device="mps", launcher="torchrun", processes=2)
    with pytest.raises(CalmError, match="device is mps, which is one device, but processes is 2"):
        parse_params(values)
    values["runtime"].update(processes=1)
    assert isinstance(parse_params(values), Params)


def test_device_of_a_model() -> None:
    assert device_of(torch.nn.Linear(1, 1)).type == "cpu"
    assert device_of(torch.nn.Linear(1, 1, device="meta")).type == "meta"


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_autocast_is_that_of_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU torch's autocast of CUDA only warns.
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    device = torch.device(kind)
    with autocast("bfloat16", device):
        assert torch.is_autocast_enabled(kind)
        assert torch.get_autocast_dtype(kind) == torch.bfloat16
    with autocast("float32", device):
        assert not torch.is_autocast_enabled(kind)


def test_precision_is_chosen_by_the_device_and_not_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert uses_bfloat16("auto", torch.device("cpu"))
    # Nothing tells how fast Apple's GPUs are at it.
    assert not uses_bfloat16("auto", torch.device("mps"))
    assert uses_bfloat16("bfloat16", torch.device("mps"))
    for supported in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, it=supported: it or including_emulation
        )
        assert uses_bfloat16("auto", torch.device("cuda")) == supported


def test_the_machine_tells_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "GPU" not in machine.describe_machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA X" if index < 2 else "NVIDIA Y")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    told = machine.describe_machine()
    assert (told["GPU"], told["CUDA"], told["cuDNN"]) == ("2 x NVIDIA X, NVIDIA Y", "12.8", "91002")
    # Work that is kept was done on one kind of device.
    on_cpu = machine.numerics("float32", torch.device("cpu"))
    on_gpu = machine.numerics("float32", torch.device("cuda", 0))
    assert (on_cpu["device"], on_gpu["device"]) == ("cpu", "cuda")
    assert "GPU" not in on_cpu
    assert on_gpu["GPU"] == told["GPU"]
