"""MessagePack files of nested maps with arrays, as Flax writes them: indexed in place, and written.

An array is an extension of type 1: its shape, dtype name and bytes. One above 1 GiB is a map of
chunks. Formats: github.com/msgpack/msgpack/blob/master/spec.md; flax.serialization. The msgpack
package would hold each array, or the whole file, in memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptj import storage
from gptj.checkpoints.weights import TensorSpec
from gptj.environment.extras import Extra
from gptj.errors import CheckpointError
from gptj.interop.pieces import Piece
from gptj.interop.tensors import StoredTensor, tensor_in_file

if TYPE_CHECKING:
    import msgpack
else:
    msgpack = Extra("msgpack", "weights of Flax")

ARRAY = 1  # the extension's type
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30  # largest unchunked array
SEPARATOR = "/"
_WINDOW = 2**16  # bytes read at a time between arrays
_DEPTH = 32  # nested maps
_NODES = 100_000  # arrays and maps: far more than a model has
_TEXT = 1000  # longest key, in bytes

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def index_msgpack(address: str) -> list[StoredTensor]:
    """The arrays of a file, named by their paths of keys (`h/0/ln_1/bias`).

    Raises:
        CheckpointError: if the file is damaged or truncated, or holds anything but maps and arrays.
    """
    scanner = _Scanner(address)
    tensors = list(scanner.arrays())
    if scanner.position != scanner.end:
        raise CheckpointError(
            f"{address} is damaged: {scanner.end - scanner.position} bytes follow its content"
        )
    return tensors


def plan_msgpack(specs: Mapping[str, TensorSpec]) -> list[Piece]:
    """A file of nested maps from array paths joined by SEPARATOR, without the arrays' bytes."""
    tree: dict[str, object] = {}
    for path, spec in specs.items():
        *folders, leaf = path.split(SEPARATOR)
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})  # type: ignore[assignment]
        branch[leaf] = spec
    return list(_pieces(tree, b""))


def _pieces(tree: dict[str, object], before: bytes) -> Iterator[Piece]:
    packer = msgpack.Packer()
    before += packer.pack_map_header(len(tree))
    for key, value in tree.items():
        before += packer.pack(key)
        found = _pieces(value, before) if isinstance(value, dict) else _array(value, before)  # type: ignore[arg-type]
        yield from found
        before = b""


def _array(spec: TensorSpec, before: bytes) -> Iterator[Piece]:
    if spec.size <= CHUNK_BYTES:
        header = before + _array_header(spec.shape, spec.dtype)
        yield Piece(header, spec, 0, spec.size)
        return
    packer = msgpack.Packer()
    count = -(-spec.size // CHUNK_BYTES)
    before += packer.pack_map_header(3)
    before += packer.pack(CHUNKED) + packer.pack(True)
    before += packer.pack("shape")
    before += packer.pack({str(axis): length for axis, length in enumerate(spec.shape)})
    before += packer.pack("chunks") + packer.pack_map_header(count)
    for number in range(count):
        start = number * CHUNK_BYTES
        size = min(CHUNK_BYTES, spec.size - start)
        before += packer.pack(str(number))
        header = before + _array_header((size // spec.dtype.itemsize,), spec.dtype)
        yield Piece(header, spec, start, size)
        before = b""


def _array_header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    packer = msgpack.Packer()
    size = math.prod(shape) * dtype.itemsize
    inner: bytes = (
        packer.pack_array_header(3) + packer.pack(shape) + packer.pack(DTYPE_NAMES[dtype])
    )
    inner += b"\xc6" + struct.pack(">I", size)
    return b"\xc9" + struct.pack(">IB", len(inner) + size, ARRAY) + inner


@dataclass(frozen=True)
class _Array:
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


class _Scanner:
    """Scans a file once, skipping the arrays' bytes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.end = storage.size(address)
        self.position = 0
        self._window = b""
        self._window_start = 0
        self._nodes = 0

    def arrays(self, path: tuple[str, ...] = ()) -> Iterator[StoredTensor]:
        """The arrays at the position: one array, or those of a nested map."""
        self._nodes += 1
        if len(path) > _DEPTH or self._nodes > _NODES:
            raise self._damaged("it has far more maps than a model")
        name = SEPARATOR.join(path)
        code = self._byte()
        if code in _EXTENSIONS:
            array = self._extension(code)
            place = (array.start, array.size)
            yield tensor_in_file(name, array.shape, array.dtype, self.address, [place])
            return
        count = self._count(code, _MAPS, 0x80, 0x0F)
        if count is None:
            raise self._damaged(f"{name or 'its content'} is neither a map nor an array")
        for number in range(count):
            key = self._text()
            if key == CHUNKED and number == 0:
                yield self._chunked(name, count)
                return
            yield from self.arrays((*path, key))

    def _chunked(self, name: str, count: int) -> StoredTensor:
        """A chunked array, after its first key; Flax writes the keys in this order."""
        if count != 3 or self._byte() != 0xC3 or self._text() != "shape":
            raise self._damaged(f"{name} is not a chunked array as Flax writes them")
        axes = self._count(self._byte(), _MAPS, 0x80, 0x0F) or 0
        shape = []
        for axis in range(min(axes, _DEPTH)):
            if self._text() != str(axis):
                raise self._damaged(f"{name} has a wrong shape")
            shape.append(self._integer())
        if self._text() != "chunks":
            raise self._damaged(f"{name} is not a chunked array as Flax writes them")
        chunks = []
        for number in range(self._count(self._byte(), _MAPS, 0x80, 0x0F) or 0):
            if self._text() != str(number):
                raise self._damaged(f"{name} lacks its chunk {number}")
            chunks.append(self._extension(self._byte()))
        size = sum(chunk.size for chunk in chunks)
        kinds = {chunk.dtype for chunk in chunks}
        if len(kinds) != 1 or size != math.prod(shape) * chunks[0].dtype.itemsize:
            raise self._damaged(f"the chunks of {name} do not match its shape {tuple(shape)}")
        places = [(chunk.start, chunk.size) for chunk in chunks]
        return tensor_in_file(name, tuple(shape), kinds.pop(), self.address, places)

    def _extension(self, code: int) -> _Array:
        if code not in _EXTENSIONS:
            raise self._damaged("an array is missing where one should be")
        width, size = _EXTENSIONS[code]
        if width:
            size = self._number(width)
        kind = self._byte()
        end = self.position + size
        if kind != ARRAY or end > self.end:
            raise self._damaged(
                f"an array of {size} bytes and type {kind} ends beyond the file, or is not an array"
            )
        if self._count(self._byte(), _ARRAYS, 0x90, 0x0F) != 3:
            raise self._damaged("an array does not have shape, dtype and bytes")
        axes = self._count(self._byte(), _ARRAYS, 0x90, 0x0F)
        if axes is None or axes > _DEPTH:
            raise self._damaged(f"an array has {axes} axes")
        shape = tuple(self._integer() for _ in range(axes))
        dtype = self._text()
        code = self._byte()
        length = self._number(_BYTES[code]) if code in _BYTES else -1
        if dtype not in DTYPES:
            raise self._damaged(f"an array has the dtype {dtype!r}")
        start = self.position
        if length != math.prod(shape) * DTYPES[dtype].itemsize or start + length != end:
            raise self._damaged(f"an array of shape {shape} and dtype {dtype} has {length} bytes")
        self.position = end
        return _Array(shape, DTYPES[dtype], start, length)

    def _text(self) -> str:
        size = self._count(self._byte(), _TEXTS, 0xA0, 0x1F)
        if size is None or size > _TEXT:
            raise self._damaged("a key is not a string, or is too long")
        try:
            text = self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a key is not UTF-8") from error
        if SEPARATOR in text:
            raise self._damaged(f"the key {text!r} has a {SEPARATOR!r}")
        return text

    def _integer(self) -> int:
        code = self._byte()
        if code < 0x80:
            return code
        if code not in _INTEGERS:
            raise self._damaged("a shape has a non-integer")
        return self._number(_INTEGERS[code])

    def _count(self, code: int, widths: Mapping[int, int], small: int, mask: int) -> int | None:
        """Length of a map, list or string, in its first byte (`small` to small + mask) or after."""
        if small <= code <= small + mask:
            return code & mask
        return self._number(widths[code]) if code in widths else None

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, size: int) -> bytes:
        if self.position + size > self.end:
            raise self._damaged("it is truncated")
        offset = self.position - self._window_start
        if not 0 <= offset <= len(self._window) - size:
            length = min(_WINDOW, self.end - self.position)
            self._window = storage.read_bytes(self.address, self.position, length)
            self._window_start, offset = self.position, 0
        self.position += size
        return self._window[offset : offset + size]

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.address} is damaged, or not a Flax file, at byte {self.position}: {reason}"
        )


# First byte: width of the number after it.
_MAPS = {0xDE: 2, 0xDF: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_INTEGERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
# The same; for fixed sizes, the size.
_EXTENSIONS = {
    0xC7: (1, 0),
    0xC8: (2, 0),
    0xC9: (4, 0),
    **{0xD4 + power: (0, 2**power) for power in range(5)},
}
