"""Index an HDF5 file: the child process that gptj.interop.hdf5 starts.

A malicious file can make the HDF5 library crash, loop or allocate any amount of memory; here that
does no harm. This process opens no files or connections and imports none of our modules. Its
argument is the file's size; it writes one JSON list per line:

    ["read", FIRST_BYTE, BYTES]            then expects that many bytes on standard input
    ["array", PATH, SHAPE, DTYPE, FIRST_BYTE]
"""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

import h5py

MEMORY_LIMIT = 2 * 2**30  # bytes of address space, of which libraries reserve some hundred MB
SECONDS_LIMIT = 30  # of CPU time
OBJECTS_LIMIT = 100_000
DEPTH_LIMIT = 32  # nested groups
MESSAGE_LIMIT = 500  # characters

DTYPES = ("float16", "float32", "float64", "int32", "int64")

Array = tuple[str, tuple[int, ...], str, int]


class AskedFile(io.RawIOBase):
    """The file, read through the parent process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._size - self._position)]
        if not len(target):
            return 0
        say("read", self._position, len(target))
        content = sys.stdin.buffer.read(len(target))
        if len(content) != len(target):
            raise EOFError("the parent process is gone")
        target[:] = content
        self._position += len(content)
        return len(content)


def say(*values: object) -> None:
    print(json.dumps(values), flush=True)


def read_index(file: AskedFile) -> Iterator[Array]:
    """Every array of the file. ValueError, or any error of h5py, if it is damaged."""
    with h5py.File(file, "r") as hdf5:
        seen = 0
        waiting = [("", hdf5)]
        while waiting:
            path, group = waiting.pop()
            for name in group:
                seen += 1
                place = f"{path}/{name}" if path else name
                if seen > OBJECTS_LIMIT or place.count("/") > DEPTH_LIMIT:
                    raise ValueError("it has far more objects than a model")
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{place} is a link, perhaps to another file: refused")
                item = group[name]
                if isinstance(item, h5py.Group):
                    waiting.append((place, item))
                else:
                    yield _describe(place, item)


def _describe(place: str, item: object) -> Array:
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"{place} is neither a group nor an array")
    if item.external or item.is_virtual:
        raise ValueError(f"{place} is stored in another file: refused")
    layout = item.id.get_create_plist()
    start = item.id.get_offset()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters() or start is None:
        raise ValueError(f"{place} is not contiguous (compressed, chunked or empty)")
    return place, item.shape, _kind(item), start


def _kind(item: h5py.Dataset) -> str:
    kind = item.id.get_type()
    if isinstance(kind, h5py.h5t.TypeFloatID) and kind.get_size() == 2:
        if kind.get_fields() == (15, 7, 8, 0, 7) and kind.get_ebias() == 127:
            return "bfloat16"
    if item.dtype.name not in DTYPES:
        raise ValueError(f"{item.name} has the dtype {item.dtype}, which is not floating point")
    if item.dtype.newbyteorder("<") != item.dtype:
        raise ValueError(f"{item.name} is big-endian")
    return str(item.dtype.name)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_LIMIT, SECONDS_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for array in read_index(AskedFile(int(sys.argv[1]))):
            say("array", *array)
    except Exception as error:  # whatever h5py raises, the parent reports a damaged file
        sys.exit(f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT])


if __name__ == "__main__":
    main()
