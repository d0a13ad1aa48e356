"""CPU quotas in made-up control groups, as kernels and containers lay them out; affinity on this machine."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calm_core.runtime.processors import available_processors, cpu_quota
from tests import ROOT, needs_linux

VERSION_2 = "31 23 0:28 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
CPU = "33 31 0:30 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "36 31 0:33 {root} {mount} rw,relatime - cgroup cgroup rw,memory"
OTHER = "21 23 0:20 / /proc rw,relatime - proc proc rw"


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """The folder of a process as in /proc, without files."""
    (tmp_path / "self").mkdir()
    return tmp_path / "self"


def describe(process: Path, groups: str, *mounts: str) -> None:
    (process / "cgroup").write_text(groups)
    (process / "mountinfo").write_text("".join(f"{mount}\n" for mount in (OTHER, *mounts)))


def version_2(folder: Path, content: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{content}\n")


def version_1(folder: Path, quota: int, period: int = 100_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("content", "quota"),
    [
        ("150000 100000", 1.5),
        ("25000 50000", 0.5),
        ("max 100000", math.inf),
        ("", math.inf),
        ("150000", math.inf),
        ("many 100000", math.inf),
        ("150000 0", math.inf),
        ("-1 100000", math.inf),
        ("150000 100000 7", math.inf),
        ("9" * 5000 + " 1", math.inf),
    ],
)
def test_version_2_in_a_container(process: Path, tmp_path: Path, content: str, quota: float) -> None:
    version_2(tmp_path / "cgroup", content)
    describe(process, "0::/\n", VERSION_2.format(root="/", mount=tmp_path / "cgroup"))
    assert cpu_quota(process) == quota


def test_the_tightest_of_the_groups_around_counts(process: Path, tmp_path: Path) -> None:
    """As systemd nests them: user.slice, the user's, the service's."""
    for name, content in [("", "800000 100000"), ("a.slice", "300000 100000"), ("a.slice/b", "max 100000"),
                          ("a.slice/b/c.scope", "400000 100000"), ("z.slice", "100000 100000")]:  # fmt: skip
        version_2(tmp_path / "cgroup" / name, content)
    describe(process, "0::/a.slice/b/c.scope\n", VERSION_2.format(root="/", mount=tmp_path / "cgroup"))
    assert cpu_quota(process) == 3
    version_2(tmp_path / "cgroup/a.slice/b/c.scope", "50000 100000")
    assert cpu_quota(process) == 0.5


def test_version_1(process: Path, tmp_path: Path) -> None:
    """Hierarchies side by side; only that of cpu has quotas, and each of its groups its own period."""
    version_1(tmp_path / "cpu", -1)
    version_1(tmp_path / "cpu/docker", 500_000)
    version_1(tmp_path / "cpu/docker/abc", 125_000, 50_000)
    version_1(tmp_path / "memory/docker/abc", 10_000)
    mounts = [CPU.format(root="/", mount=tmp_path / "cpu"), MEMORY.format(root="/", mount=tmp_path / "memory")]
    describe(process, "4:memory:/docker/abc\n1:cpuacct,cpu:/docker/abc\n0::/\n", *mounts)
    assert cpu_quota(process) == 2.5
    version_1(tmp_path / "cpu/docker/abc", -1)
    assert cpu_quota(process) == 5


def test_a_container_that_sees_its_own_group_as_the_root_of_the_mount(process: Path, tmp_path: Path) -> None:
    """Without a namespace of cgroups the path is that of the host, of which the container sees the end."""
    version_1(tmp_path / "cpu", 200_000)
    version_1(tmp_path / "cpu/inner", 100_000)
    mount = CPU.format(root="/docker/abc", mount=tmp_path / "cpu")
    describe(process, "1:cpu:/docker/abc\n", mount)
    assert cpu_quota(process) == 2
    describe(process, "1:cpu:/docker/abc/inner\n", mount)
    assert cpu_quota(process) == 1
    describe(process, "1:cpu:/docker/abcdef/inner\n", mount)  # of another container
    assert cpu_quota(process) == 2


def test_a_path_out_of_the_namespace_leads_nowhere(process: Path, tmp_path: Path) -> None:
    version_2(tmp_path / "sibling", "50000 100000")
    version_2(tmp_path / "cgroup", "200000 100000")
    describe(process, "0::/../sibling\n", VERSION_2.format(root="/", mount=tmp_path / "cgroup"))
    assert cpu_quota(process) == 2


def test_both_versions_side_by_side(process: Path, tmp_path: Path) -> None:
    """systemd's hybrid layout: cpu in version 1, version 2 mounted for other purposes."""
    version_1(tmp_path / "cpu/job", 150_000)
    (tmp_path / "unified/job").mkdir(parents=True)
    mounts = [CPU.format(root="/", mount=tmp_path / "cpu"), VERSION_2.format(root="/", mount=tmp_path / "unified")]
    describe(process, "1:name=systemd:/\n2:cpu:/job\n0::/job\n", *mounts)
    assert cpu_quota(process) == 1.5


def test_a_mount_point_with_a_space(process: Path, tmp_path: Path) -> None:
    version_2(tmp_path / "two words", "150000 100000")
    mount = str(tmp_path / "two words").replace(" ", "\\040")
    describe(process, "0::/\n", VERSION_2.format(root="/", mount=mount))
    assert cpu_quota(process) == 1.5


@pytest.mark.parametrize("groups", ["", "0::/gone\n", "garbage", ":::::", "0::\n", "x:cpu\n\n", "\x00"])
@pytest.mark.parametrize("mount", ["", " - ", "31 23 - cgroup2", "1 2 3 4 5 6 - cgroup cgroup", "\x00 - \x00"])
def test_garbage_is_no_quota(process: Path, groups: str, mount: str) -> None:
    describe(process, groups, mount)
    assert cpu_quota(process) == math.inf


def test_what_cannot_be_read_is_no_quota(process: Path, tmp_path: Path) -> None:
    assert cpu_quota(process) == math.inf
    assert cpu_quota(tmp_path / "missing") == math.inf
    (tmp_path / "cgroup/cpu.max").mkdir(parents=True)  # reading it fails, whoever reads
    describe(process, "0::/\n", VERSION_2.format(root="/", mount=tmp_path / "cgroup"))
    assert cpu_quota(process) == math.inf
    (process / "cgroup").write_bytes(b"0::/\xff\xfe\n")
    assert cpu_quota(process) == math.inf


@pytest.mark.parametrize(
    ("content", "processors"),
    [("50000 100000", 1), ("150000 100000", 1), ("290000 100000", 2), ("900000 100000", 4), ("max 100000", 4)],
)
def test_the_quota_bounds_the_affinity(
    process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, processors: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 7}, raising=False)
    version_2(tmp_path / "cgroup", content)
    describe(process, "0::/\n", VERSION_2.format(root="/", mount=tmp_path / "cgroup"))
    assert available_processors(process) == processors


@pytest.mark.parametrize(
    ("performance_cores", "count", "processors"), [("6", 10, 6), ("", 10, 10), ("junk", 10, 10), ("", None, 1)]
)
def test_without_affinity(
    process: Path,
    monkeypatch: pytest.MonkeyPatch,
    performance_cores: str,
    count: int | None,
    processors: int,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    asked: list[str] = []

    def sysctl(name: str) -> str:
        asked.append(name)
        return performance_cores

    monkeypatch.setattr("calm_core.runtime.processors.sysctl", sysctl)
    assert available_processors(process) == processors
    assert asked == ["hw.perflevel0.physicalcpu"]


@needs_linux
def test_one_processor_of_this_machine() -> None:
    program = "from calm_core.runtime.processors import available_processors as count; print(count())"
    allowed = os.sched_getaffinity(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    counts = []
    for pinned in ([], ["taskset", "-c", str(min(allowed))]):
        command = [*pinned, sys.executable, "-c", program]
        counts.append(int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))
    assert 1 <= counts[0] <= len(allowed)
    assert counts[1] == 1
