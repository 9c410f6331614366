"""Read and write local paths and `s3://bucket/key` addresses through one interface.

gptj.storage.addresses defines the addresses. S3 goes through boto3, which reads the usual AWS
variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), profiles and
instance roles. Requests have a timeout, carry a checksum that the server verifies, and are retried
through outages (gptj.storage.retries). Writes are atomic on both kinds of storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gptj.environment.extras import Extra
from gptj.storage import local
from gptj.storage.addresses import is_s3, join, local_path, split_s3
from gptj.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from gptj.storage.listing import FileInfo, every
from gptj.storage.parallel import PARALLEL, PART_BYTES, for_each
from gptj.storage.protocol import Storage

if TYPE_CHECKING:
    from gptj.storage import s3 as _s3
    from gptj.storage import s3_client as _s3_client
else:
    _s3 = Extra("gptj.storage.s3", "an s3:// address", "boto3")
    _s3_client = Extra("gptj.storage.s3_client", "an s3:// address", "boto3")

__all__ = [
    "PARALLEL",
    "PART_BYTES",
    "AccessDeniedError",
    "AlreadyExistsError",
    "FileInfo",
    "NotFoundError",
    "StorageError",
    "UnreachableError",
    "be_patient",
    "check_writable",
    "delete",
    "delete_folder",
    "delete_unfinished",
    "download",
    "download_folder",
    "exists",
    "fenced",
    "for_each",
    "is_s3",
    "join",
    "list_files",
    "open_read",
    "open_write",
    "read_bytes",
    "read_into",
    "read_scattered",
    "read_start",
    "size",
    "split_s3",
    "stat",
    "upload",
    "upload_folder",
    "write_bytes",
]


def _of(address: str) -> Storage:
    return _s3 if is_s3(address) else local


def exists(address: str) -> bool:
    """Whether there is a file at the address."""
    return _of(address).exists(address)


def size(address: str) -> int:
    """A file's size in bytes; NotFoundError if it does not exist."""
    return _of(address).size(address)


def stat(address: str) -> FileInfo:
    """A file's size and version; NotFoundError if there is none.

    Its `name` is its base name.
    """
    return _of(address).stat(address)


def list_files(
    folder: str, chosen: Callable[[str], bool] = every, *, follow_links: bool = True
) -> list[FileInfo]:
    """All files below a folder, sorted by name; empty if there are none.

    Files still being written are not listed.

    Args:
        chosen: which files, and which folders to look into, by their names relative to the folder;
            a folder's ends with `/`. What is not chosen is not read, and so causes no error.
        follow_links: whether to look into linked local folders. Otherwise these, and broken links,
            are left out: do so before deleting.

    Raises:
        NotFoundError: if the bucket does not exist.
        AccessDeniedError: if a folder may not be read.
        StorageError: if a link is broken.
    """
    return _of(folder).list_files(folder, chosen, follow_links=follow_links)


def read_bytes(address: str, start: int = 0, length: int | None = None) -> bytes:
    """A file's content, or `length` bytes of it starting at `start`.

    NotFoundError if there is no such file, StorageError if it ends before `start + length`.
    """
    if length is None:
        length = size(address) - start
    content = bytearray(length)
    read_into(address, start, memoryview(content))
    return bytes(content)


def read_start(address: str, length: int) -> tuple[bytes, int]:
    """The first `length` bytes of a file (all if it is shorter) and its size, in one request.

    NotFoundError if there is no such file.
    """
    return _of(address).read_start(address, length)


def read_into(address: str, start: int, target: memoryview) -> None:
    """Fill `target` from a file, starting at byte `start`; large reads are parallel requests.

    StorageError if the file ends before `target` is full.
    """
    _of(address).read_into(address, start, target)


def read_scattered(address: str, start: int, targets: Sequence[memoryview]) -> None:
    """Fill several buffers in order from a file, starting at byte `start`; on S3 in one request.

    StorageError if the file ends before all are full.
    """
    _of(address).read_scattered(address, start, targets)


def open_read(
    address: str, *, buffer_bytes: int = PART_BYTES // 4
) -> AbstractContextManager[IO[bytes]]:
    """A seekable file; from S3 it is fetched in pieces on demand.

    `buffer_bytes` is the smallest piece: use a small one for random access.
    """
    return _of(address).open_read(address, buffer_bytes)


def write_bytes(address: str, content: bytes, *, if_absent: bool = False) -> None:
    """Write a whole file; with `if_absent`, AlreadyExistsError if there already is one."""
    _of(address).write_bytes(address, content, if_absent=if_absent)


def open_write(
    address: str, *, expected_size: int | None = None, if_absent: bool = False
) -> AbstractContextManager[IO[bytes]]:
    """A file to write sequentially; it appears when the block ends without an error.

    With `if_absent`, the block's end raises AlreadyExistsError if there is one by then.

    To S3 it is uploaded in parts while it is written: memory holds a few parts, and no disk is
    needed. `expected_size` (bytes) makes the parts large enough for a file of more than 80 GB.
    """
    return _of(address).open_write(address, expected_size, if_absent=if_absent)


def download(address: str, path: str | Path) -> None:
    """Copy a file to a local path, in parallel parts, creating the path's parent folders."""
    storage = _of(address)  # checks the address before a folder is made
    local.make_folder(Path(path).parent)
    storage.download(address, Path(path))


def upload(path: str | Path, address: str) -> None:
    """Copy a local file to an address, in parallel parts."""
    _of(address).upload(Path(path), address)


def download_folder(
    address: str, path: str | Path, names: Iterable[str] | None = None
) -> list[FileInfo]:
    """Copy a folder's files, or those with the given relative names, to a local folder."""
    wanted = None if names is None else set(names)
    files = [file for file in list_files(address) if wanted is None or file.name in wanted]
    if wanted is not None and (missing := wanted - {file.name for file in files}):
        raise NotFoundError(f"{address} has no {', '.join(sorted(missing))}")
    for_each(lambda file: download(file.address, Path(path, file.name)), files)
    return files


def upload_folder(path: str | Path, address: str) -> list[FileInfo]:
    """Copy a local folder's files to an address."""
    files = list_files(str(path))
    for_each(lambda file: upload(file.address, join(address, file.name)), files)
    return files


def delete(address: str) -> None:
    """Delete a file, if it exists."""
    _of(address).delete(address)


def delete_folder(
    address: str, *, first: str | None = None, fence: Callable[[], None] = lambda: None
) -> None:
    """Delete all files below an address, if there are any. Of a link, only the link.

    Args:
        first: the file to delete before all others, so that nothing takes the rest for complete.
        fence: raises if this process may no longer write; called after `first` is deleted.
    """
    if first is not None and (is_s3(address) or not local_path(address).is_symlink()):
        delete(join(address, first))
        fence()
    _of(address).delete_folder(address)


def delete_unfinished(folder: str, chosen: Callable[[str], bool] = every) -> None:
    """Delete the unlisted leftovers of writers that were killed.

    Args:
        chosen: which files, by their names relative to the folder; nobody may be writing them.
    """
    _of(folder).delete_unfinished(folder, chosen)


def be_patient(addresses: Iterable[str]) -> None:
    """Retry for minutes if S3 does not answer, even on the first request.

    By default only a server that has already answered this process gets that long. Meant for
    processes of a job whose driver has already reached S3.

    Args:
        addresses: all that this process reads or writes; if none is on S3, nothing changes.
    """
    if any(address.startswith("s3://") for address in addresses):
        _s3_client.retry_policy().patient = True


@contextmanager
def fenced(address: str, fence: Callable[[], None]) -> Iterator[None]:
    """Call `fence` before requests that change something on S3 are tried again.

    It raises if this process may no longer write: a request may be retried for minutes, in which
    others take over. The caller checks the fence before the first try. Holds for all requests of
    this process, if the address is on S3.
    """
    if not is_s3(address):
        yield
        return
    with _s3_client.retry_policy().fenced(fence):
        yield


def check_writable(address: str) -> None:
    """Write small files below the address like a long job will at its end, then delete them.

    Call at the start, to detect a missing bucket, another user's folder or a server without the
    required features early. Raises StorageError.
    """
    _of(address).check_writable(address)
