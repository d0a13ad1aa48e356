"""Makes this Python on Linux lack what CPython lacks on macOS, before anything else is imported.

The names are those whose availability the library reference gives as Linux, or as Unix but not macOS. Only the standard
library can be changed this way: compiled code goes on as on Linux, sys.platform stays what it is, since that is what
packages were installed for, and so do file systems, shells and other programs, bar a sysctl like that of macOS.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import select
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MISSING: dict[ModuleType, tuple[str, ...]] = {
    os: (
        "sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_setparam", "sched_getscheduler",
        "sched_setscheduler", "sched_rr_get_interval", "sched_param", "posix_fallocate", "posix_fadvise",
        "copy_file_range", "splice", "eventfd", "eventfd_read", "eventfd_write", "memfd_create", "pidfd_open", "pipe2",
        "getrandom", "fdatasync", "getxattr", "setxattr", "listxattr", "removexattr", "getresuid", "getresgid",
        "setresuid", "setresgid", "unshare", "setns", "waitid", "process_cpu_count", "timerfd_create",
        "timerfd_settime", "timerfd_gettime", "O_DIRECT", "O_TMPFILE", "O_PATH", "O_NOATIME", "O_LARGEFILE", "O_RSYNC",
        "SCHED_BATCH", "SCHED_IDLE", "GRND_NONBLOCK", "GRND_RANDOM",
    ),
    signal: ("sigtimedwait", "sigwaitinfo", "pidfd_send_signal", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGSTKFLT",
             "SIGCLD", "SIGPOLL"),
    select: ("epoll", "EPOLLIN", "EPOLLOUT"),
    resource: ("prlimit", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING",
               "RUSAGE_THREAD"),
    time: ("pthread_getcpuclockid", "CLOCK_BOOTTIME", "CLOCK_TAI"),
    fcntl: ("F_SETPIPE_SZ", "F_GETPIPE_SZ", "F_NOTIFY", "F_SETLEASE", "F_SETSIG", "F_ADD_SEALS", "F_OFD_SETLK"),
    mmap: ("MAP_POPULATE", "MAP_DENYWRITE", "MAP_EXECUTABLE", "MAP_STACK", "MADV_HUGEPAGE", "MADV_REMOVE"),
}  # fmt: skip

# That of the C library: what glibc has beyond it.
MISSING_FUNCTIONS = {
    "mallopt",
    "malloc_trim",
    "malloc_usable_size",
    "prctl",
    "sched_getaffinity",
    "gettid",
    "sched_getcpu",
}

MISSING_FOLDERS = ("/proc", "/sys", "/dev/shm")

# Compiled for Linux, it reads /proc in Python; on macOS another module of it is installed.
NOT_PORTABLE = {"psutil"}

# Others ask for the system to load their compiled parts, which are those of Linux.
OWN = {"calm_core", "stages", "flows", "benchmarks", "verification", "tests"}

EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.mkdir", "os.link", "os.symlink")


def take_away() -> None:
    """Make this process lack it all."""
    for module, names in MISSING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    platform.system = _system
    ctypes.CDLL = CLibrary  # type: ignore[misc]
    sys.addaudithook(_refuse)
    for name in ("stat", "lstat", "access", "readlink"):  # these tell audit hooks nothing
        setattr(os, name, _without_folders(getattr(os, name), OSError if name != "access" else None))
    os.environ["PATH"] = f"{Path(__file__).parent / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


_real_system = platform.system


def _system() -> str:
    asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
    return "Darwin" if asking in OWN else _real_system()


class CLibrary(ctypes.CDLL):
    """A C library in which some functions are not found."""

    def __getattr__(self, name: str) -> Any:
        if name in MISSING_FUNCTIONS:
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return super().__getattr__(name)


def _hidden(path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    if not any(text == folder or text.startswith(f"{folder}/") for folder in MISSING_FOLDERS):
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in NOT_PORTABLE:
            return False
        frame = frame.f_back
    return True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and _hidden(arguments[0]):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(arguments[0]))


def _without_folders(function: Any, error: type[OSError] | None) -> Any:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if not _hidden(path):
            return function(path, *arguments, **options)
        if error is None:
            return False
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))

    return call


take_away()
