"""The finished files of a long piece of work: a killed process loses only the file that it was writing.

They lie outside the artefacts, which a stage replaces as a whole, in a folder keyed by params, inputs and code. A
file's name there ends in the SHA-256 of its content: a single atomic rename publishes both, and damage is found when it
is read.
"""

import os
import re
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from calm_core.storage.atomic import move_into_place, scratch_folder
from calm_core.storage.checksum import sha256


class FinishedFiles:
    """The finished files of one piece of work, in ``folder``; ``name`` is how the lines that it prints begin."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name

    def scratch(self, process: int = 0) -> AbstractContextManager[Path]:
        """An empty folder for the unfinished files of ``process``; removed at the end with all that is left in it."""
        return scratch_folder(self.folder / f"process-{process}")

    def keep(self, path: Path) -> str:
        """Move the finished file at ``path``, in the scratch folder, to the kept ones; returns its SHA-256.

        Raises:
            OSError: it cannot be flushed to disk.
        """
        # Before the rename: the final name contains it.
        digest = sha256(path)
        move_into_place(path, self._path(path.name, digest))
        return digest

    def find(self, name: str) -> str | None:
        """SHA-256 of the finished file ``name``, None if there is none; a damaged one is reported and removed."""
        stem, suffix = Path(name).stem, Path(name).suffix
        pattern = re.compile(rf"{re.escape(stem)}-([0-9a-f]{{64}}){re.escape(suffix)}")
        # Read in full to verify: a file may have been damaged since it was finished, and its hash goes into the
        # description.
        for path in sorted(self.folder.glob(f"{stem}-*{suffix}")):
            if match := pattern.fullmatch(path.name):
                if sha256(path) == match[1]:
                    return match[1]
                self.tell(f"{path} is damaged; it is made again")
                path.unlink()
        return None

    def read_bytes(self, name: str, digest: str) -> bytes:
        """Content of the finished file ``name``."""
        return self._path(name, digest).read_bytes()

    def size(self, name: str, digest: str) -> int:
        """Bytes of the finished file ``name``."""
        return self._path(name, digest).stat().st_size

    def put(self, name: str, digest: str, folder: Path) -> None:
        """Put the finished file ``name`` into ``folder`` too: as a hard link where possible, which takes no space."""
        source = self._path(name, digest)
        try:
            os.link(source, folder / name)
        except OSError:  # two file systems, or one that knows no links
            shutil.copyfile(source, folder / name)

    def tell(self, line: str) -> None:
        """Print ``line`` on standard error."""
        print(f"{self._name}: {line}", file=sys.stderr, flush=True)

    def _path(self, name: str, digest: str) -> Path:
        return self.folder / f"{Path(name).stem}-{digest}{Path(name).suffix}"
