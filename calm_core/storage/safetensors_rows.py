"""Safetensors files larger than memory: written row by row in any order, after the header; and memory-mapped.

The bytes are those that safetensors itself writes for the same tensors, but `save_file` needs each tensor in memory.
A file that is being written is not mapped, so it costs no more memory than the rows of one read or write.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing
from safetensors import safe_open

Shape = tuple[np.typing.DTypeLike, tuple[int, ...]]
"""What numbers a tensor holds, and its shape."""

_DTYPES = {"uint16": "U16", "int32": "I32", "int64": "I64", "float16": "F16"}
_NAMES = {code: name for name, code in _DTYPES.items()}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file at ``path``, which this module wrote, memory-mapped and read-only.

    Libraries map files copy-on-write, and such a mapping counts towards the process's memory limit with its full
    length, whatever is read of it: a corpus larger than the limit could not be opened.

    Raises:
        FileNotFoundError or SafetensorError: the file is missing or damaged.
    """
    with safe_open(path, framework="np"):  # validates the header, and the file's length against it
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.asarray(np.memmap(path, np.uint8, mode="r", offset=0))[8 + length :]
    return {
        name: data[slice(*tensor["data_offsets"])].view(_NAMES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in header.items()
        if name != "__metadata__"
    }


class TensorFile:
    """A new file at ``path`` of tensors, zero until their rows are written."""

    def __init__(self, path: Path, tensors: Mapping[str, Shape]) -> None:
        header: dict[str, dict[str, object]] = {}
        self._tensors: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        end = 0
        # Safetensors' order: the widest numbers first, then by name.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-np.dtype(item[1][0]).itemsize, item[0])):
            dtype, start = np.dtype(dtype), end
            end += dtype.itemsize * int(np.prod(shape))
            header[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
            self._tensors[name] = (dtype, shape[1:], start)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # Padded with spaces, as safetensors does, so that tensors begin at a multiple of 8 bytes.
        encoded += b" " * (-len(encoded) % 8)
        self._data = 8 + len(encoded)
        self._file = path.open("w+b")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        # Zeros, without writing any: a sparse file where the file system has those.
        self._file.truncate(self._data + end)

    def write(self, name: str, row: int, values: np.ndarray) -> None:
        """Put ``values`` [rows, ...], converted to the tensor's dtype, at ``row`` and after."""
        dtype, shape, start = self._tensors[name]
        self._file.seek(self._data + start + row * self._row_bytes(name))
        self._file.write(np.ascontiguousarray(values.reshape(-1, *shape), dtype=dtype).data)

    def read(self, name: str, row: int, rows: int) -> np.ndarray:
        """``rows`` rows from ``row`` on; they must be there."""
        dtype, shape, start = self._tensors[name]
        values = np.empty((rows, *shape), dtype)
        self._file.seek(self._data + start + row * self._row_bytes(name))
        self._file.readinto(values.data)
        return values

    def flush(self) -> None:
        """Pass buffered writes to the file, for readers that map it."""
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _row_bytes(self, name: str) -> int:
        dtype, shape, _ = self._tensors[name]
        return dtype.itemsize * int(np.prod(shape))
