"""What a run ran on: processor, versions, git revision."""

import platform
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from calm_core.runtime.precision import Precision, has_bfloat16, uses_bfloat16
from calm_core.runtime.sysctl import sysctl

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "datasets", "tokenizers", "polars", "safetensors", "pydantic", "dvc", "dvclive", "botocore")


def describe_machine() -> dict[str, str]:
    """Facts for the report, name to value; equal for two runs of one revision on one machine.

    GPU, CUDA and cuDNN are named where there is a GPU.
    """
    bfloat16 = "in hardware" if has_bfloat16(torch.device("cpu")) else "float32 by default"
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "bfloat16": bfloat16,
        **_accelerator(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "git revision": _git_revision(),
    }


def numerics(precision: Precision, device: torch.device) -> dict[str, str | int | bool]:
    """What the last digits of a computation on ``device`` depend on beside params, inputs and code; plain JSON."""
    return {
        "threads": torch.get_num_threads(),
        "bfloat16": uses_bfloat16(precision, device),
        "processor": processor(),
        "torch": torch.__version__,
        "device": device.type,
        **({} if device.type == "cpu" else _accelerator()),
    }


def processor() -> str:
    """The processor's name and the instructions that torch uses of it; numbers differ between two of these."""
    name = sysctl("machdep.cpu.brand_string") or _name_in(CPUINFO) or platform.processor() or platform.machine()
    # Torch picks its kernels by this; other kernels add in another order and round differently.
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _name_in(cpuinfo: Path) -> str:
    """The processor's name; on arm, where Linux knows none, the numbers that stand for its maker and each kind of core.

    Empty if the file tells neither.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    names = [value for key, value in fields if key == "model name"]
    if names:
        return names[0]
    # A block of lines a core, its maker first; sorted, since a core that sleeps when the machine starts comes late.
    cores, maker, variant = set(), "", ""
    for key, value in fields:
        if key == "CPU implementer":
            maker = value
        elif key == "CPU variant":
            variant = value
        elif key == "CPU part":
            cores.add(f"implementer {maker} part {value} variant {variant}")
    return f"Arm {', '.join(sorted(cores))}" if cores else ""


def _accelerator() -> dict[str, str]:
    """Name and libraries of the GPUs that torch finds; nothing if it finds none."""
    if torch.cuda.is_available():
        # A line a kind of GPU: machines have several of one kind.
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return {
            "GPU": ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items()),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    if torch.backends.mps.is_available():
        return {"GPU": f"Apple's, by Metal (macOS {platform.mac_ver()[0]})"}
    return {}


def _git_revision() -> str:
    try:
        # A copy without git may lie inside another repository, whose commits say nothing of this code.
        subprocess.run(["git", "ls-files", "--error-unmatch", "dvc.yaml"], capture_output=True, check=True)
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
