"""Which device a run computes on, the CPU or an accelerator: as params.yaml or --device names it, or the best there is.

Functions that are given a model or tensors make theirs on the same device; they need no more than ``device_of``.
"""

import os
from typing import Literal

import torch
from torch import nn

from calm_core.errors import CalmError
from calm_core.runtime.launcher import processes_here, processes_of_run

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(name: DeviceName, setting: str = "runtime.device") -> torch.device:
    """The device ``name``, which the user gave as ``setting``; "auto" is CUDA, else MPS, else the CPU.

    Each process that a launcher has started on this machine gets a GPU of its own, which becomes torch's current one.

    Raises:
        CalmError: the device is not there, or there are fewer of it than processes that need one.
    """
    if name == "auto":
        name = _best()
    if name == "cuda":
        return _gpu(setting)
    if name == "mps":
        _require_mps(setting)
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """Where the weights of ``model`` are."""
    return next(model.parameters()).device


def _best() -> Literal["cpu", "cuda", "mps"]:
    if torch.cuda.is_available():
        return "cuda"
    # Apple's GPU is one, and torch has no collectives on it: several processes share the CPU.
    return "mps" if torch.backends.mps.is_available() and processes_of_run() == 1 else "cpu"


def _gpu(setting: str) -> torch.device:
    if not torch.cuda.is_available():
        build = "" if torch.backends.cuda.is_built() else ", and this build of torch could use none"
        raise CalmError(f"{setting} is cuda, but torch finds no CUDA device{build}; use cpu or auto")
    processes, gpus = processes_here(), torch.cuda.device_count()
    if processes > gpus:
        raise CalmError(
            f"{processes} processes on this machine need a GPU each, and it has {gpus}; start {gpus} or fewer"
        )
    # Without an index the current device would be GPU 0 in every process.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _require_mps(setting: str) -> None:
    if not torch.backends.mps.is_available():
        raise CalmError(f"{setting} is mps, but torch finds no GPU of Apple's; use cpu or auto")
    if (processes := processes_of_run()) > 1:
        raise CalmError(f"{setting} is mps, which is one device, but there are {processes} processes; use one, or cpu")
