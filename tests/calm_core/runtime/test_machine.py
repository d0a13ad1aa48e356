"""The processor's name from what x86, arm and macOS tell of it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import calm_core.runtime.machine as machine
from calm_core.runtime.machine import processor
from calm_core.runtime.sysctl import sysctl

X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14: 96 cores\n\n"


def arm(implementer: int, *parts: int, variant: int = 1) -> str:
    """As Linux lists the cores of an arm processor."""
    return "\n".join(
        f"processor\t: {number}\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16\nCPU implementer\t: {implementer:#x}\n"
        f"CPU architecture: 8\nCPU variant\t: {variant:#x}\nCPU part\t: {part:#x}\nCPU revision\t: 1\n"
        for number, part in enumerate(parts)
    )


NEOVERSE_N1, NEOVERSE_V1, NEOVERSE_V2 = arm(0x41, 0xD0C), arm(0x41, 0xD40), arm(0x41, 0xD4F)
CORTEX_X1_A78_A55, CORTEX_A78_A55 = arm(0x41, 0xD44, 0xD41, 0xD05), arm(0x41, 0xD41, 0xD05)
CORTEX_A55 = arm(0x41, 0xD05, 0xD05)
APPLE, STEPPING = arm(0x61, 0, variant=0), arm(0x61, 0, variant=1)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of /proc/cpuinfo."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    return tmp_path / "cpuinfo"


def test_x86(named: Path) -> None:
    named.write_text(X86 + X86.replace("96 cores", "other"))
    assert processor() == f"AMD EPYC 9R14: 96 cores ({torch.backends.cpu.get_cpu_capability()})"


def test_arm(named: Path) -> None:
    names = []
    for cores in (
        NEOVERSE_N1,
        NEOVERSE_V1,
        NEOVERSE_V2,
        CORTEX_X1_A78_A55,
        CORTEX_A78_A55,
        CORTEX_A55,
        APPLE,
        STEPPING,
    ):
        named.write_text(cores)
        names.append(processor())
    assert len(set(names)) == len(names)
    assert names[1].startswith("Arm implementer 0x41 part 0xd40 variant 0x1 (")


def test_the_name_depends_on_neither_number_nor_order_of_cores(named: Path) -> None:
    names = set()
    for parts in ([0xD44, 0xD41, 0xD05], [0xD05, 0xD05, 0xD41, 0xD44, 0xD41]):
        named.write_text(arm(0x41, *parts))
        names.add(processor())
    assert len(names) == 1


@pytest.mark.parametrize("content", [None, b"", b"processor\t: 0\nhart\t: 2\nisa\t: rv64imafdc\n", b"\xff\xfe: \xff\n"])
def test_a_machine_that_does_not_tell(named: Path, content: bytes | None) -> None:
    if content is not None:
        named.write_bytes(content)
    assert processor() == f"aarch64 ({torch.backends.cpu.get_cpu_capability()})"


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """macOS with its sysctl first on PATH, to be written."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program = tmp_path / "sysctl"
    program.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "Apple M2 Pro"\n')
    program.chmod(0o755)
    return program


def test_macos(mac: Path) -> None:
    assert processor() == f"Apple M2 Pro ({torch.backends.cpu.get_cpu_capability()})"
    assert sysctl("hw.nothing") == ""


def test_macos_without_sysctl(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(mac.parent / "nothing"))
    assert sysctl("machdep.cpu.brand_string") == ""


def test_linux_is_not_asked(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sysctl is another program."""
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert sysctl("machdep.cpu.brand_string") == ""


def test_the_revision_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a repository that a copy without git happens to lie in."""
    inside = tmp_path / "archive"
    inside.mkdir()
    (inside / "dvc.yaml").touch()
    (tmp_path / "other").touch()
    identity = ("-c", "user.name=a", "-c", "user.email=b")
    for arguments in (("init", "--quiet"), ("add", "other"), (*identity, "commit", "--quiet", "--message", "other")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.chdir(inside)
    assert machine.describe_machine()["git revision"] == "not a git checkout"
    subprocess.run(["git", "add", "dvc.yaml"], cwd=inside, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--message", "tracked"], cwd=inside, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=inside, check=True, capture_output=True, text=True).stdout
    assert machine.describe_machine()["git revision"] == head[:12]
