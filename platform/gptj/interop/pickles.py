"""PyTorch's `.bin` files: index the tensors without reading them.

Only tensors are unpickled (`weights_only=True`), and only their positions: under a FakeTensorMode,
PyTorch records each tensor's offset in the file
(https://docs.pytorch.org/docs/stable/notes/serialization.html). A file on S3 thus needs no local
copy, and memory holds one tensor.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptj import storage
from gptj.checkpoints.pickled import state_dict
from gptj.errors import CheckpointError
from gptj.interop.tensors import StoredTensor, bytes_of, narrowed

# Files from PyTorch before 1.6 have no offsets and must be loaded whole.
OLD_FORMAT_LIMIT = 256 * 2**20  # bytes


def index_pickle(address: str) -> list[StoredTensor]:
    """The tensors of a state dict written by `torch.save`.

    Raises:
        CheckpointError: if the file is damaged, holds more than tensors, or is in the format
            before PyTorch 1.6 and too large to load; see gptj.checkpoints.pickled.
    """
    size = storage.size(address)
    zipped = size >= 4 and storage.read_bytes(address, 0, 4) == b"PK\x03\x04"
    if not zipped and size > OLD_FORMAT_LIMIT:
        raise CheckpointError(
            f"{address} is damaged, or in the format before PyTorch 1.6, which cannot be read "
            f"tensor by tensor; remedy: torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    state = state_dict(address, partial(_load, address, fake=zipped))
    if zipped:
        return [_stored(name, tensor, address, size) for name, tensor in state.items()]
    return [_held(name, tensor) for name, tensor in state.items()]


def _load(address: str, fake: bool) -> Any:
    with storage.open_read(address, buffer_bytes=2**16) as file:
        if not fake:
            return torch.load(file, map_location="cpu", weights_only=True)
        with FakeTensorMode():
            return torch.load(file, map_location="cpu", weights_only=True)


def _stored(name: str, fake: Tensor, address: str, size: int) -> StoredTensor:
    """A tensor that is a view of bytes in the file."""
    storage_bytes = fake.untyped_storage().nbytes()
    start = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    if start is None or start + storage_bytes > size:
        raise CheckpointError(f"{address}: {name} lies beyond the end of the file: it is damaged")
    shape, stride, offset = tuple(fake.shape), fake.stride(), fake.storage_offset()
    dtype = fake.dtype
    count, needed = storage_bytes // dtype.itemsize, math.prod(shape)
    reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if needed > count or (needed > 0 and reach > count):
        raise CheckpointError(
            f"{address}: {name} has the shape {shape}, but {count} stored numbers"
        )
    negated = fake.is_neg()  # what is stored; see Tensor.resolve_neg

    def load(target: torch.dtype) -> Tensor:
        held = torch.empty(count, dtype=dtype)
        storage.read_into(address, start, bytes_of(held))
        view = held.as_strided(shape, stride, offset)
        return narrowed(view.neg() if negated else view, target, name)

    return StoredTensor(name, shape, dtype, load)


def _held(name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(
        name, tuple(tensor.shape), tensor.dtype, lambda dtype: narrowed(tensor, dtype, name)
    )
