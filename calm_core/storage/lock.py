"""A lock that goes with the process that holds it, however it ends, on any file system."""

from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, SoftFileLock, Timeout


def acquire(path: Path, poll_seconds: float = 0.0) -> AcquireReturnProxy:
    """Take the lock at ``path``, until the returned context is left; wait for it if ``poll_seconds`` are given.

    Raises:
        Timeout: another process holds it, and there is no waiting.
        OSError: the file cannot be made.
    """
    try:
        return _take(FileLock(path), poll_seconds)
    except Timeout:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        # Some network and FUSE file systems know no flock. A file that says who holds it does there: whoever comes next
        # on this machine finds out whether that process still lives.
        return _take(SoftFileLock(path.with_suffix(".holder")), poll_seconds)


def _take(lock: FileLock | SoftFileLock, poll_seconds: float) -> AcquireReturnProxy:
    return lock.acquire(poll_interval=poll_seconds) if poll_seconds else lock.acquire(blocking=False)
