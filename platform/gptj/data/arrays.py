"""Arrays on disk: appended incrementally, then memory-mapped and shared by processes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

FIELDS = "fields.json"

Array = np.ndarray[Any, Any]


class ArrayFile:
    """A `.npy` file that grows along its first axis; memory holds only what is appended."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._shape = shape  # of one element
        self._file: IO[bytes] = path.open("wb")
        self.length = 0
        self._file.write(self._header())

    def append(self, values: Array) -> None:
        assert values.shape[1:] == self._shape
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()

    def _header(self) -> bytes:
        """Constant in size: numpy pads it for a growing first axis."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.length, *self._shape),
            },
        )
        return header.getvalue()


class ArrayWriter:
    """A folder's arrays, each created by the first append."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, ArrayFile] = {}
        self._last: dict[str, int] = {}  # the last value of each array of ends

    def append(self, name: str, values: Array) -> None:
        if name not in self._files:
            path = self._folder / f"{name}.npy"
            self._files[name] = ArrayFile(path, values.dtype, values.shape[1:])
        self._files[name].append(values)

    def append_ends(self, name: str, lengths: Array) -> None:
        """Append the offsets of concatenated lists: list i is ends[i]:ends[i + 1]."""
        if name not in self._last:
            self.append(name, np.zeros(1, np.int64))
            self._last[name] = 0
        ends = self._last[name] + np.cumsum(lengths, dtype=np.int64)
        self._last[name] = int(ends[-1]) if len(ends) else self._last[name]
        self.append(name, ends)

    def length(self, name: str) -> int:
        """Values appended so far."""
        return self._files[name].length if name in self._files else 0

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@contextmanager
def writing_arrays(folder: Path, fields: dict[str, Any]) -> Iterator[ArrayWriter]:
    """Write arrays to a new folder within the block.

    Args:
        fields: JSON-serializable; the block may add to them. Written last.
    """
    folder.mkdir(parents=True)
    writer = ArrayWriter(folder)
    try:
        yield writer
    finally:
        writer.close()
    (folder / FIELDS).write_text(json.dumps(fields))


def load_arrays(folder: Path) -> tuple[dict[str, Array], Mapping[str, Any]]:
    """The arrays, memory-mapped, and the fields."""
    arrays = {
        file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in folder.glob("*.npy")
    }
    return arrays, json.loads((folder / FIELDS).read_text())
