"""Lazy tensors: the metadata is known, the values are read on demand.

Every format is opened as a list of these, under Hugging Face's names, so that conversions hold one
tensor in memory, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptj import storage
from gptj.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: the file's; later Hugging Face's.
        dtype: as it is stored.
        load: reads the values as a tensor of `shape`, in the given dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[torch.dtype], Tensor]

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, name: str) -> StoredTensor:
        return replace(self, name=name)

    def transposed(self) -> StoredTensor:
        """The transposed matrix; CheckpointError if it is not a matrix."""
        if len(self.shape) != 2:
            raise CheckpointError(f"{self.name} has the shape {self.shape}, but should be a matrix")

        def load(dtype: torch.dtype) -> Tensor:
            return self.load(dtype).T

        return replace(self, shape=self.shape[::-1], load=load)


def tensor_in_file(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    address: str,
    places: Sequence[tuple[int, int]],
) -> StoredTensor:
    """A tensor stored contiguously, or in pieces, in a file, local or on S3.

    Args:
        places: (first byte, bytes) of its pieces; most tensors have one.
    """

    def load(target: torch.dtype) -> Tensor:
        stored = torch.empty(shape, dtype=dtype)
        view = bytes_of(stored)
        for start, size in places:
            storage.read_into(address, start, view[:size])
            view = view[size:]
        assert not view, f"{name}: {len(view)} bytes are not in the file"
        return narrowed(stored, target, name)

    return StoredTensor(name, shape, dtype, load)


def bytes_of(tensor: Tensor) -> memoryview:
    """A view of a contiguous tensor's bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype; see fill."""
    if tensor.dtype == dtype:
        return tensor
    return fill(torch.empty(tensor.shape, dtype=dtype), tensor, name)


def fill(target: Tensor, values: Tensor, name: str) -> Tensor:
    """Copy values into a tensor of another dtype, without a temporary copy.

    Raises:
        CheckpointError: if a finite value overflows the target's dtype.
    """
    target.copy_(values)
    narrows = torch.finfo(target.dtype).max < torch.finfo(values.dtype).max
    if narrows and target.numel() and not all(x.isfinite() for x in torch.aminmax(target)):
        largest = values.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
        if largest > torch.finfo(target.dtype).max:
            raise CheckpointError(
                f"{name} has values up to {largest:g}, but "
                f"the maximum of {str(target.dtype).removeprefix('torch.')} is "
                f"{torch.finfo(target.dtype).max:g}; remedy: bfloat16 or float32"
            )
    return target
