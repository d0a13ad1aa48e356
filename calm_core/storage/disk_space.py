"""Whether a file system has space for what is about to be written, checked before hours of work and not after."""

import shutil
from pathlib import Path

from calm_core.errors import CalmError


def require_disk_space(path: Path, needed_bytes: int, purpose: str) -> None:
    """Raise CalmError unless the file system of ``path`` has ``needed_bytes`` free."""
    # The folder itself may not be there yet; its file system is that of the nearest parent.
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CalmError(
            f"{purpose} need {needed_bytes / 1e6:,.0f} MB in {path} but {free / 1e6:,.0f} MB are free; "
            "free some disk space or lower corpus.documents or autoencoder.latent_size"
        )
