"""Which group each held-out document is of: what the splits keep together, a service or a file for instance.

Documents of one group resemble each other, so intervals are over groups. The file lies beside the tokens and not among
them, since trainings depend on all of those.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.storage.atomic import write_bytes


def write_groups(path: Path, groups: Mapping[str, np.ndarray]) -> None:
    """Write ``splits.group_number`` of each document of the held-out splits, [documents] uint64 each, as Parquet."""
    content = BytesIO()
    frames = [
        pl.DataFrame({"split": [split] * len(of), "document": np.arange(len(of)), "group": of})
        for split, of in groups.items()
    ]
    pl.concat(frames).write_parquet(content)
    write_bytes(path, content.getvalue())


def read_groups(path: Path, split: str, documents: int) -> Tensor:
    """The groups of the ``documents`` of ``split``, [documents] int64, numbered from 0 on.

    Raises:
        CalmError: the file is missing, or is of other tokens.
    """
    if not path.is_file():
        raise CalmError(f"{path} is missing; `dvc repro` makes it")
    with path.open("rb") as file:  # polars takes no name that is not UTF-8
        found = pl.read_parquet(file).filter(pl.col("split") == split).sort("document")["group"].to_numpy()
    if len(found) != documents:
        raise CalmError(f"{path} is of {len(found)} documents of {split}, which has {documents}; run `dvc repro`")
    return torch.from_numpy(np.unique(found, return_inverse=True)[1].astype(np.int64))
