"""Unpack a published `.tar.zst` of mesh-transformer-jax into a folder of shard files.

GPT-J's weights were published as one such file. A tensor's parts are spread over all of it, so it
must be unpacked before it can be read; it is never held in memory.
Header format: POSIX 1003.1 ustar. Python's tarfile trusts the sizes in headers.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gptj import storage
from gptj.environment.extras import Extra
from gptj.errors import CheckpointError
from gptj.interop.progress import Progress

if TYPE_CHECKING:
    import zstandard
else:
    zstandard = Extra("zstandard", "a .tar.zst file")

SUFFIXES = (".tar.zst", ".tar.zstd")
WINDOW_LIMIT = 2**27  # bytes of memory a stream may need; zstd's own default
_BLOCK = 512
_READ_BYTES = 2**20
_MEMBER = re.compile(r"(?:.*/)?shard_(\d{1,4})/(\d{1,4})\.npz")

logger = logging.getLogger(__name__)


def is_stream(address: str) -> bool:
    return address.endswith(SUFFIXES)


def unpack(address: str, folder: Path) -> None:
    """Write `shard_N/M.npz` below a folder, ignoring everything else in the stream.

    Raises:
        CheckpointError: if the stream is damaged or truncated.
        OSError: if the disk is full.
    """
    logger.info("unpacking %s into %s", address, folder)
    progress = Progress(storage.size(address))
    try:
        with storage.open_read(address) as file, _decompressed(file) as stream:
            for member in _members(stream, address):
                progress.reach(file.tell(), f"unpacking {member.name}")
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.regular:
                    _copy(stream, None, member, address)
                    continue
                path = folder / f"shard_{int(match[1])}" / f"{int(match[2])}.npz"
                path.parent.mkdir(exist_ok=True)
                if path.exists():
                    raise CheckpointError(f"{address} is damaged: it has {member.name} twice")
                if member.size > shutil.disk_usage(folder).free:
                    raise OSError(
                        f"{folder} has no room for {member.name} of {member.size} bytes; remedy: "
                        f"unpack it into another folder"
                    )
                with open(path, "xb") as target:
                    _copy(stream, target, member, address)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"{address} is damaged or not a zstd stream: {error}") from error


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    regular: bool  # a regular file


def _decompressed(file: IO[bytes]) -> zstandard.ZstdDecompressionReader:
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT)
    return decompressor.stream_reader(file, read_across_frames=True, closefd=False)


def _members(stream: IO[bytes], address: str) -> Iterator[_Member]:
    """The headers; the caller reads each member's content before the next one."""
    while True:
        header = _read(stream, _BLOCK, address)
        if not header.strip(b"\0"):  # the end of the archive
            return
        claimed = _octal(header[148:156])
        if claimed != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise CheckpointError(f"{address} is damaged: wrong header checksum")
        size = _octal(header[124:136])
        if size is None:
            raise CheckpointError(f"{address} is damaged: a file has no size")
        name, prefix = _text(header[:100]), _text(header[345:500])
        if header[257:262] == b"ustar" and header[262:263] == b"\0" and prefix:
            name = f"{prefix}/{name}"
        yield _Member(name, size, header[156:157] in (b"0", b"\0"))


def _copy(stream: IO[bytes], target: IO[bytes] | None, member: _Member, address: str) -> None:
    left = member.size
    while left:
        chunk = _read(stream, min(left, _READ_BYTES), address)
        if target is not None:
            target.write(chunk)
        left -= len(chunk)
    _read(stream, -member.size % _BLOCK, address)


def _read(stream: IO[bytes], size: int, address: str) -> bytes:
    content = bytearray()
    while len(content) < size:
        chunk = stream.read(size - len(content))
        if not chunk:
            raise CheckpointError(f"{address} is truncated or not a tar file")
        content += chunk
    return bytes(content)


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]{1,12}", text) else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")
