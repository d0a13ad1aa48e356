"""Whether a folder is what `dvc repro` can work in: one with .dvc, inside a git repository or told to do without."""

import configparser
import sys
from pathlib import Path

from calm_core.errors import CalmError


def require_checkout(folder: Path, experiments: bool = False) -> None:
    """Raise CalmError, with the remedy, if DVC would refuse to work in ``folder``: a downloaded archive, for instance.

    ``experiments`` cannot do without git, though DVC can. Does not start DVC, which takes a second.
    """
    here = folder.absolute()
    in_git = any((above / ".git").exists() for above in (here, *here.parents))
    if not (here / ".dvc").is_dir():
        anew = (
            "`git checkout -- .dvc` or `dvc init --subdir`"
            if in_git
            else "copy hidden files, too, or `dvc init --no-scm`"
        )
        raise CalmError(f"{here} has no folder .dvc: {anew}")
    if {"{", "}"} & set(str(here)) and not _setting(here, "cache", "dir"):
        raise CalmError(
            f"{here} has a brace in its path, which DVC cannot have in its cache's: move it, or "
            "`dvc cache dir --local FOLDER` with a folder elsewhere"
        )
    if not in_git and (experiments or _setting(here, "core", "no_scm").lower() != "true"):
        without = "experiments need one" if experiments else "or `dvc config --local core.no_scm true` does without"
        raise CalmError(
            f"{here} is in no git repository: `git init && git add --all && git commit --message start` makes one; "
            f"{without}"
        )


def _setting(folder: Path, section: str, key: str) -> str:
    """What DVC's settings in ``folder``, or else those of the user, say; empty if nothing."""
    settings = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        settings.read(
            [Path("~/.config/dvc/config").expanduser(), folder / ".dvc/config", folder / ".dvc/config.local"],
            encoding="utf-8",
        )
        return settings.get(section, key, fallback="")
    except (configparser.Error, ValueError, RuntimeError, OSError):  # DVC will say what is wrong
        return ""


if __name__ == "__main__":
    try:
        require_checkout(Path.cwd())
    except CalmError as error:
        sys.exit(str(error))
