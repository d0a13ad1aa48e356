"""How many processors this process may compute on.

Notable:
- a container's CPU quota is no affinity: all processors of the machine are there, and the kernel stops the container's
  threads for the rest of a period once they have used up their time;
- a quota of 1.5 means one processor. Threads that wait for one another spin, so each takes a whole processor; with one
  thread more than the quota pays for, the kernel stops them in the middle of a step. Measured on two processors with
  a quota of 1.5, two threads made half of the steps that they make without, while one thread lost nothing;
- on Apple silicon the efficiency cores are left out, as torch does: the slowest thread of a parallel loop ends it.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from calm_core.runtime.sysctl import sysctl


def available_processors(process: Path = Path("/proc/self")) -> int:
    """How many processors affinity and CPU quota leave to this process, 1 at least; ``process`` is its folder in /proc.

    Fewer than the machine has in a container, under taskset or under a batch system.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
        performance_cores = sysctl("hw.perflevel0.physicalcpu")
        if performance_cores.isdecimal():
            count = min(count, int(performance_cores))
    return max(1, int(min(count, cpu_quota(process))))


def cpu_quota(process: Path = Path("/proc/self")) -> float:
    """The processors' worth of time that cgroups (version 1 or 2) grant; infinite without a quota, and if none is told.

    The limit of every group around the process's own counts as well, as far as the container sees them.
    """
    return min((quota for group in _groups(process) for quota in _quotas(group)), default=math.inf)


def _groups(process: Path) -> Iterator[Path]:
    """The folders of the control groups that hold the process: in each hierarchy its own, and those above."""
    # A line is "number:controllers:path"; version 2 has no controllers there, version 1 a hierarchy for each few.
    paths: dict[str, str] = {}
    for line in _lines(process / "cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(process / "mountinfo"):
        # Six fields and optional ones, a dash, then the type, the source and the options of the file system.
        mounted, kind = (part.split() for part in line.partition(" - ")[::2])
        if len(mounted) < 6 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            hierarchy = ""
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            hierarchy = "cpu"
        else:
            continue
        if hierarchy in paths:
            yield from _upwards(_unescaped(mounted[3]), _unescaped(mounted[4]), paths[hierarchy])


def _upwards(root: str, mount_point: str, path: str) -> Iterator[Path]:
    """From the group at ``path`` up to ``root``, which is what the hierarchy shows at ``mount_point``."""
    own, inside = PurePosixPath(path), PurePosixPath()
    # A path outside of what is shown, as namespaces can make it, leaves the limits of the root.
    if own.is_relative_to(root) and ".." not in own.parts:
        inside = own.relative_to(root)
    for group in (inside, *inside.parents):
        yield Path(mount_point) / group


def _quotas(group: Path) -> Iterator[float]:
    """The quota in cpu.max (version 2: "150000 100000" or "max 100000"), and the one in the files of version 1."""
    version_2 = _lines(group / "cpu.max")
    version_1 = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    for words in (" ".join(version_2).split(), version_1):
        # Version 1 writes -1 for no quota.
        if len(words) == 2 and all(re.fullmatch(r"\d{1,18}", word, re.ASCII) and int(word) > 0 for word in words):
            yield int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """mountinfo writes spaces and the like as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), field)
