"""The hash that identifies artefacts."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """SHA-256 of the file at ``path``, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
