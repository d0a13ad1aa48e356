"""Where libraries keep what they may need again: in the home, or for this process alone where that cannot be written.

Containers and services often run as a user without a home, or with one that is read-only or knows no locks.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


def use_writable_caches() -> None:
    """To be called before the first import of datasets, huggingface_hub or matplotlib, which read the variables then.

    Each cache that cannot be written gets a temporary folder, which goes with this process; what is cached already, and
    what the user has chosen and can be written, stays.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hugging_face = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    # Datasets' takes a lock even for a file that is streamed.
    _choose("HF_DATASETS_CACHE", f"{hugging_face}/datasets")
    if not _expanded(f"{hugging_face}/hub").is_dir():  # one that is filled and read-only, shared by many, is fine
        _choose("HF_HUB_CACHE", f"{hugging_face}/hub")
    _choose("MPLCONFIGDIR", f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/matplotlib")


def is_writable(folder: str) -> bool:
    """Whether files can be made and locked in ``folder``, or in the nearest folder above it that is there.

    A `~` that stands for no home, since the user has none, cannot be written.
    """
    place = _expanded(folder)
    if str(place).startswith("~"):
        return False
    try:
        existing = next(above for above in (place, *place.absolute().parents) if above.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _expanded(folder: str) -> Path:
    return Path(os.path.expanduser(folder))  # noqa: PTH111 - pathlib's raises where the user has no home


def _choose(variable: str, usual: str) -> None:
    if is_writable(os.environ.get(variable) or usual):
        return
    with contextlib.suppress(OSError):  # nothing can be written: whoever needs the cache says so
        # The system's temporary folder, or the current one where that is full or missing.
        folder = tempfile.mkdtemp(prefix="calm-cache-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[variable] = folder
