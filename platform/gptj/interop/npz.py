"""NumPy's `.npz` files: index the arrays in a zip archive without reading them.

`numpy.savez` stores arrays uncompressed, so each can be read in place, even from S3. NumPy's own
reader holds whole files in memory and trusts their headers.
Formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, APPNOTE.TXT.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj import storage
from gptj.errors import CheckpointError
from gptj.interop.tensors import StoredTensor, bytes_of, narrowed

# NumPy has no bfloat16 and writes it as two opaque bytes.
DTYPES = {
    "V2": torch.bfloat16,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
    "u4": torch.uint32,
    "u8": torch.uint64,
}
_MEMBER = re.compile(r"arr_(\d{1,6})\.npy")
_HEADER = re.compile(
    rb"\{'descr': '([<|>=])([a-zA-Z]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \}\s*"
)
_LOCAL_HEADER = 30  # bytes of a zip member's local header, before its name
_HEADER_BYTES = 4096  # read in one request; plain arrays have shorter headers


@dataclass(frozen=True)
class Member:
    """An array of the archive."""

    address: str
    name: str
    start: int  # byte offset of its zip header
    size: int  # bytes of its .npy file
    crc: int
    end: int  # bytes of the zip file


def index_npz(address: str) -> list[Member]:
    """The arrays arr_0, arr_1, … of an archive, in that order.

    Raises:
        CheckpointError: if the file is damaged, truncated, or not what `numpy.savez` writes.
    """
    total = storage.size(address)
    try:
        with (
            storage.open_read(address, buffer_bytes=2**16) as file,
            zipfile.ZipFile(file) as archive,
        ):
            infos = archive.infolist()
    except _DAMAGES as error:
        raise CheckpointError(f"{address} is not a readable .npz file: {error}") from error
    members: dict[int, Member] = {}
    for info in infos:
        match = _MEMBER.fullmatch(info.filename)
        if match is None or int(match[1]) in members:
            raise CheckpointError(f"{address}: unexpected member {info.filename!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{address}: {info.filename} is compressed or encrypted, which "
                f"mesh-transformer-jax never does; remedy: rewrite it with numpy.savez"
            )
        members[int(match[1])] = Member(
            address, info.filename, info.header_offset, info.file_size, info.CRC, total
        )
    if sorted(members) != list(range(len(members))):
        raise CheckpointError(f"{address}: arrays are missing, it has only {sorted(members)}")
    return [members[number] for number in range(len(members))]


# What the zipfile module raises for damaged archives.
_DAMAGES = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
    struct.error,
)


def open_member(member: Member) -> StoredTensor:
    """A member's array: reads its header, not its values.

    Raises:
        CheckpointError: if the header is damaged or does not match the member's size.
    """
    place = f"{member.address}: {member.name}"
    room = member.end - member.start
    head = storage.read_bytes(member.address, member.start, max(0, min(_HEADER_BYTES, room)))
    if len(head) < _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{place} is not where the directory says: the file is damaged")
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    first = _LOCAL_HEADER + name_length + extra_length
    shape, dtype, fortran, length = _parse_header(head[first:], place)
    header = head[first : first + length]
    size = math.prod(shape) * dtype.itemsize
    start = member.start + first + length
    if length + size != member.size or start + size > member.end:
        raise CheckpointError(
            f"{place} has {member.size - length} bytes of values, but its header says {size}"
        )

    def load(target: torch.dtype) -> Tensor:
        stored = torch.empty(shape[::-1] if fortran else shape, dtype=dtype)
        storage.read_into(member.address, start, bytes_of(stored))
        if zlib.crc32(bytes_of(stored), zlib.crc32(header)) != member.crc:
            raise CheckpointError(f"{place} was altered after it was written: its CRC is wrong")
        return narrowed(
            stored.permute(*range(len(shape))[::-1]) if fortran else stored, target, place
        )

    return StoredTensor(place, shape, dtype, load)


def _parse_header(content: bytes, place: str) -> tuple[tuple[int, ...], torch.dtype, bool, int]:
    """Shape, dtype, whether it is in Fortran order, and the header's size in bytes."""
    if content[:6] != b"\x93NUMPY" or content[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise CheckpointError(f"{place} is not in NumPy's array format 1.0 or 2.0")
    prefix = 10 if content[6] == 1 else 12
    length = prefix + int.from_bytes(content[8:prefix], "little")
    match = _HEADER.fullmatch(content[prefix:length])
    if length > len(content) or match is None:
        raise CheckpointError(
            f"{place} has a header that numpy.savez does not write for plain arrays: "
            f"{content[prefix : prefix + 80]!r}"
        )
    order, kind = match[1].decode(), match[2].decode()
    if kind not in DTYPES or order == ">":
        raise CheckpointError(f"{place} has the dtype {order + kind}, which is not floating point")
    shape = tuple(int(text) for text in match[4].decode().split(",") if text.strip())
    return shape, DTYPES[kind], match[3] == b"True", length
