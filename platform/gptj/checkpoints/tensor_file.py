"""The header of a safetensors file: each tensor's position, checked against the file's size.

Format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes,
little-endian; the header, JSON with names, dtypes, shapes and offsets; then the tensors' bytes,
without gaps. Headers are not trusted: nothing beyond the file's end is allocated or read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.errors import CheckpointError
from gptj.serialization.json_object import parse_object

HEADER_LIMIT = 16 * 2**20  # bytes; GPT-J's header has 40 KB
FIRST_BYTES = 128 * 2**10  # read before the header's length is known
MAX_DIMENSIONS = 8
LARGEST = 2**60  # elements

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
UNSUPPORTED = {  # the format's other dtypes
    *("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"),
    *("U16", "U32", "U64", "C64"),
}


@dataclass(frozen=True)
class StoredTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def view(self, buffer: Any, offset: int = 0) -> Tensor:
        """The tensor as a view of a writable byte buffer."""
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        count = self.size // self.dtype.itemsize
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=offset)
        return flat.view(self.shape)


@dataclass(frozen=True)
class Header:
    content: bytes  # everything before the tensors
    tensors: list[StoredTensor]  # in file order
    file_size: int  # bytes


def read_header(address: str) -> Header:
    """Read a file's header, in one request unless it is unusually long.

    Raises:
        CheckpointError: naming the file and what is wrong: it is truncated, its header is damaged
            or does not match its size, or a tensor's dtype is not supported.
    """
    start, total = storage.read_start(address, FIRST_BYTES)
    if total < 8:
        raise CheckpointError(f"{address} is truncated: it has {total} bytes, fewer than 8")
    length = int.from_bytes(start[:8], "little")
    if length > total - 8:
        raise CheckpointError(
            f"{address} is truncated or not a safetensors file: its header should have {length} "
            f"bytes, but the whole file has {total}"
        )
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{address} is damaged: its header should have {length} bytes, more than the "
            f"{HEADER_LIMIT} that any model needs"
        )
    content = start[: 8 + length]
    if missing := 8 + length - len(content):
        content += storage.read_bytes(address, len(content), missing)
    header = content[8:]
    fields = parse_object(header, f"{address} (its header)")
    fields.pop("__metadata__", None)
    tensors = [_tensor(name, each, 8 + length, address) for name, each in fields.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(address, tensor.name, "its bytes overlap others or leave a gap")
        end = tensor.end
    if total != end:
        raise CheckpointError(
            f"{address} has {total} bytes but its header promises {end}: it is "
            + ("truncated" if total < end else "damaged")
        )
    return Header(content, tensors, total)


def _tensor(name: str, fields: Any, data: int, address: str) -> StoredTensor:
    if not isinstance(fields, dict):
        raise _damaged(address, name, f"{shown(fields)} does not describe a tensor")
    dtype_name: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if isinstance(dtype_name, str) and dtype_name in UNSUPPORTED:
        raise CheckpointError(
            f"{address} has {shown(name)} in the dtype {dtype_name}, which is not supported; "
            f"remedy: the model in F16, BF16 or F32"
        )
    if dtype is None:
        raise _damaged(
            address, name, f"its dtype {shown(dtype_name)} is not one of {', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(address, name, f"{shown(shape)} is not a valid shape")
    if math.prod(max(size, 1) for size in shape) > LARGEST:
        raise _damaged(address, name, f"the shape {shown(shape)} is too large")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(address, name, f"{shown(offsets)} are not valid data_offsets")
    start, end = offsets
    size = math.prod(shape) * dtype.itemsize
    if end - start != size:
        raise _damaged(
            address, name, f"its shape needs {size} bytes, its data_offsets span {end - start}"
        )
    return StoredTensor(name, dtype, tuple(shape), data + start, data + end)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of non-negative integers; JSON's true is not one."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= LARGEST for n in value)


def _damaged(address: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{address} is damaged at {shown(name)}: {reason}")
