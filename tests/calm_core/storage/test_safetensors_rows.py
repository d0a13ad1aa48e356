"""Files written piece by piece, against safetensors itself."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calm_core.storage.safetensors_rows import Shape, TensorFile


@pytest.mark.parametrize("rows", [0, 1, 10])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, rows: int) -> None:
    draws = np.random.default_rng(0)
    tensors = {
        "b": draws.normal(size=(rows, 3)).astype(np.float16),
        "a": draws.normal(size=(rows, 2, 2)).astype(np.float16),
        "token_ids": draws.integers(1 << 16, size=2 * rows).astype(np.uint16),
        "numbers": draws.integers(1 << 40, size=rows),
        "zero": np.zeros(5, np.int32),
    }
    shapes: dict[str, Shape] = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    with TensorFile(tmp_path / "pieces.safetensors", shapes) as file:
        for start in reversed(range(0, 2 * rows, 3)):
            for name, values in tensors.items():
                if name != "zero":
                    file.write(name, start, values[start : start + 3])
        for name, values in tensors.items():
            middle = len(values) // 2
            np.testing.assert_array_equal(file.read(name, middle, len(values) - middle), values[middle:])
    save_file(tensors, tmp_path / "whole.safetensors")
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    loaded = load_file(tmp_path / "pieces.safetensors")
    assert all((loaded[name] == values).all() for name, values in tensors.items())


def test_values_are_converted(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "a.safetensors", {"a": (np.int32, (4,))}) as file:
        file.write("a", 1, np.array([7, 8], np.int64)[::-1])
        assert file.read("a", 0, 4).tolist() == [0, 8, 7, 0]
