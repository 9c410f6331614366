"""HDF5 files of plain arrays: indexed in place, and written sequentially.

The HDF5 library is C code, and files are not trusted. So it only locates the arrays, in a separate
process with bounded time and memory, and we read their bytes. When writing, it only makes a file
with holes for the arrays, which we fill while the file is copied to its destination.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptj import storage
from gptj.checkpoints.weights import TensorSpec
from gptj.environment.extras import Extra, require
from gptj.errors import CheckpointError
from gptj.interop.pieces import Piece
from gptj.interop.tensors import StoredTensor, tensor_in_file

if TYPE_CHECKING:
    import h5py
else:
    h5py = Extra("h5py", "weights of TensorFlow")

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}
# An attribute must fit in an object header; longer lists are split, as Keras does.
ATTRIBUTE_BYTES = 64_000


def index_hdf5(address: str) -> list[StoredTensor]:
    """The arrays of a file, by their paths in it.

    Raises:
        CheckpointError: if the file is damaged, or an array is not contiguous and uncompressed.
    """
    require("h5py", "weights of TensorFlow")  # which the child process needs
    size = storage.size(address)
    tensors = []
    for name, shape, kind, start in _ask_child(address, size):
        length = math.prod(shape) * DTYPES[kind].itemsize
        if start + length > size:
            raise CheckpointError(f"{address} is damaged: {name} ends beyond the file")
        places = [(start, length)]
        tensors.append(tensor_in_file(name, tuple(shape), DTYPES[kind], address, places))
    return tensors


def _ask_child(address: str, size: int) -> Iterator[tuple[str, list[int], str, int]]:
    """The arrays that the child process finds; serves the bytes it requests."""
    # -P: import installed packages, not the modules next to the script.
    command = [sys.executable, "-P", str(Path(__file__).with_name("hdf5_index.py")), str(size)]
    with (
        storage.open_read(address, buffer_bytes=2**16) as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            for line in child.stdout:
                kind, *values = json.loads(line)
                if kind == "array":
                    yield values[0], values[1], values[2], values[3]
                else:
                    file.seek(values[0])
                    child.stdin.write(file.read(values[1]))
                    child.stdin.flush()
        except (BrokenPipeError, json.JSONDecodeError):
            child.kill()  # it died mid-message: its exit status says why
        reason = child.stderr.read().decode(errors="replace").strip()
    if child.returncode != 0:
        reason = reason or f"the HDF5 library exited with {child.returncode}"
        raise CheckpointError(f"{address} is not a readable HDF5 file: {reason}")


@dataclass(frozen=True)
class Group:
    """The content of a group, or of the root: arrays by path, and lists of names."""

    path: str
    arrays: Sequence[tuple[str, TensorSpec]]
    lists: dict[str, list[str]]  # attributes


def plan_hdf5(groups: Sequence[Group]) -> list[Piece]:
    """Everything in the file except the arrays' bytes, which follow their pieces."""
    places: list[tuple[int, TensorSpec]] = []
    with tempfile.TemporaryDirectory(prefix="gptj-hdf5-") as folder:
        path = Path(folder, "holes.h5")  # sparse: takes hardly any disk space
        with h5py.File(path, "w") as file:
            for group in groups:
                target = file.require_group(group.path)
                for name, values in group.lists.items():
                    _write_list(target, name, values)
                for name, spec in group.arrays:
                    dataset = _make_hole(target, name, spec)
                    if spec.size:
                        places.append((dataset.get_offset(), spec))
        pieces, position = [], 0
        with open(path, "rb") as written:
            for start, spec in sorted(places, key=lambda place: place[0]):
                written.seek(position)
                pieces.append(Piece(written.read(start - position), spec, 0, spec.size))
                position = start + spec.size
            written.seek(position)
            return [*pieces, Piece(written.read(), None, 0, 0)]


def _make_hole(target: h5py.Group, name: str, spec: TensorSpec) -> h5py.h5d.DatasetID:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(spec.shape)
    return h5py.h5d.create(
        target.id, name.encode(), hdf5_type(spec.dtype), space, dcpl=layout, lcpl=links
    )


def hdf5_type(dtype: torch.dtype) -> h5py.h5t.TypeID:
    """HDF5's number type; NumPy, and so h5py, has none for bfloat16."""
    if dtype == torch.bfloat16:
        kind = h5py.h5t.IEEE_F16LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)  # positions and widths of sign, exponent and mantissa
        kind.set_ebias(127)
        return kind
    return h5py.h5t.py_create(np.dtype(str(dtype).removeprefix("torch.")).newbyteorder("<"))


def _write_list(target: h5py.Group, name: str, values: list[str]) -> None:
    encoded = [value.encode() for value in values]
    parts = max(1, math.ceil(sum(map(len, encoded)) / ATTRIBUTE_BYTES))
    while any(np.asarray(part).nbytes > ATTRIBUTE_BYTES for part in np.array_split(encoded, parts)):
        parts += 1
    if parts == 1:
        target.attrs[name] = encoded
        return
    for number, part in enumerate(np.array_split(encoded, parts)):
        target.attrs[f"{name}{number}"] = part
