"""Which folder a relative path of params.yaml starts from: the user's own tree, wherever the stage runs.

`dvc exp run --queue` and `--temp`, and flows with overrides, run stages in copies under .dvc/tmp, which hold what git
knows: text that it ignores is not there, and of text that it knows in part a glob would find that part alone.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COPIES = (".dvc", "tmp")
"""Under these folders of a tree DVC and the flows keep their copies of it."""


def users_tree() -> Path:
    """The tree that the current folder is a copy of; the current folder if it is none."""
    here = Path.cwd()
    for tree in reversed(here.parents):
        inside = here.relative_to(tree).parts
        # A copy has a folder of its own, and that one stands in another: exps/tmpa1b2c3, flows/run-a1b2c3.
        if inside[:2] == COPIES and len(inside) >= 4 and (tree / "params.yaml").is_file():
            return tree
    return here


@contextmanager
def in_users_tree() -> Iterator[None]:
    """While the block runs, relative paths are the user's; what it writes has to be named by absolute ones."""
    with contextlib.chdir(users_tree()):
        yield
