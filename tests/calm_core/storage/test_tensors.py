"""Weights that the system does not give are not called damaged, since deleting them would not help."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calm_core.errors import CalmError
from calm_core.storage.tensors import damaged, load_tensors, save_tensors
from tests import needs_linux

NOT_MAPPED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@needs_linux
@pytest.mark.skipif(not NOT_MAPPED.is_file(), reason="no file here that cannot be mapped")
def test_a_file_system_that_maps_no_files() -> None:
    with pytest.raises(CalmError, match=r"^/sys/.* cannot be read: .*maps no files into memory; move the project"):
        load_tensors(NOT_MAPPED)
    with pytest.raises(OSError, match="No such device") as raised:
        np.memmap(NOT_MAPPED, np.uint8, mode="r")
    assert "maps no files into memory" in str(damaged(NOT_MAPPED, raised.value))


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CalmError, match=r"is missing or damaged .*; delete it and run `dvc repro`$"):
        load_tensors(path)
    save_tensors({"a": torch.arange(3)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CalmError, match=r"is missing or damaged .*; delete it and run `dvc repro`$"):
        load_tensors(path)
    assert str(damaged(path, PermissionError(13, "Permission denied"))).endswith(
        "cannot be read: [Errno 13] Permission denied"
    )
