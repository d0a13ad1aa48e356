"""What a run ran on: processor, versions, git revision."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from calm_core.runtime.precision import Precision, has_bfloat16, uses_bfloat16

PACKAGES = ("torch", "datasets", "tokenizers", "polars", "safetensors", "pydantic", "dvc", "dvclive", "botocore")


def describe_machine() -> dict[str, str]:
    """Facts for the report, name to value; equal for two runs of one revision on one machine."""
    bfloat16 = "in hardware" if has_bfloat16(torch.device("cpu")) else "emulated, so float32 by default"
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "bfloat16": bfloat16,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "git revision": _git_revision(),
    }


def numerics(precision: Precision) -> dict[str, str | int | bool]:
    """What the last digits of a computation on the CPU depend on beside params, inputs and code; plain JSON."""
    return {
        "threads": torch.get_num_threads(),
        "bfloat16": uses_bfloat16(precision, torch.device("cpu")),
        "processor": processor(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name and the instructions that torch uses of it; numbers differ between two of these."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # Torch picks its kernels by this; other kernels add in another order and round differently.
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability})"


def _git_revision() -> str:
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
