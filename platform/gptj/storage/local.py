"""Files on a disk: what is written appears as a whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gptj.storage.addresses import local_path
from gptj.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    ends_early,
)
from gptj.storage.listing import FileInfo

COPY_BYTES = 16 * 2**20
_UNFINISHED = ".unfinished"


def exists(address: str) -> bool:
    return local_path(address).is_file()


def size(address: str) -> int:
    with explaining(address):
        return local_path(address).stat().st_size


def list_files(folder: str) -> list[FileInfo]:
    root = local_path(folder)
    paths = (path for path in root.rglob("*") if path.is_file())
    files = [
        FileInfo(str(path), path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
        if not path.name.endswith(_UNFINISHED)
    ]
    return sorted(files, key=lambda file: file.name)


def read_start(address: str, length: int) -> tuple[bytes, int]:
    with explaining(address), local_path(address).open("rb") as file:
        return file.read(length), os.fstat(file.fileno()).st_size


def read_into(address: str, start: int, target: memoryview) -> None:
    with explaining(address), io.FileIO(local_path(address)) as file:
        file.seek(start)
        filled = 0
        while filled < len(target):
            count = file.readinto(target[filled:])
            if not count:
                raise ends_early(address, len(target) - filled)
            filled += count


@contextmanager
def open_read(address: str) -> Iterator[IO[bytes]]:
    with explaining(address), local_path(address).open("rb") as file:
        yield file


@contextmanager
def open_write(address: str, *, if_absent: bool) -> Iterator[IO[bytes]]:
    """A file beside the path, synced and moved there at the end."""
    path = local_path(address)
    with explaining(address):
        make_folder(path.parent)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                _link(unfinished, path)  # unlike a rename, this refuses an existing file
            else:
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)


def copy(address: str, path: Path) -> None:
    with open_read(address) as source, open_write(str(path), if_absent=False) as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def delete(address: str) -> None:
    with explaining(address):
        local_path(address).unlink(missing_ok=True)


def delete_folder(address: str) -> None:
    if local_path(address).exists():
        with explaining(address):
            shutil.rmtree(local_path(address))


def delete_unfinished(folder: str) -> None:
    """Files below a folder that processes began to write and were killed at."""
    for path in local_path(folder).rglob(f"*{_UNFINISHED}"):
        delete(str(path))


def check_writable(folder: str) -> None:
    """Write a small file as the end of long work does, and delete it. StorageError if that fails.

    The folder stays.
    """
    path = local_path(folder)
    make_folder(path)
    probe = path / f".writable-{secrets.token_hex(8)}"
    try:
        with open_write(str(probe), if_absent=True) as file:
            file.write(b"new")
    except _NoHardLinksError:
        raise
    except StorageError as error:
        raise type(error)(_unwritable(path, error.__cause__)) from error
    delete(str(probe))


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it. StorageError that says which one it is that cannot be."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        raise _KINDS.get(type(error), StorageError)(_unwritable(path, error)) from error


_KINDS: dict[type[OSError], type[StorageError]] = {PermissionError: AccessDeniedError}


def _unwritable(folder: Path, error: BaseException | None) -> str:
    """Why nothing can be written to a folder, by what there is above it."""
    above = folder
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    reason = error.strerror if isinstance(error, OSError) else str(error)
    if above.is_symlink() and not above.exists():
        reason, remedy = f"{above} is a link to nothing", "delete the link"
    elif not above.is_dir():
        reason, remedy = f"{above} is a file and no folder", "choose another folder"
    elif isinstance(error, PermissionError):
        owner = above.stat()
        remedy = (
            f"choose another folder, or let user {os.getuid()} write to {above}, which belongs to "
            f"user {owner.st_uid} (mode {owner.st_mode & 0o7777:o})"
        )
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"make room on the disk ({_file_system(above)}), or choose another folder"
    else:
        remedy = f"choose another folder; {above} is on a file system of type {_file_system(above)}"
    return f"nothing can be written to {folder}: {reason}; remedy: {remedy}"


# What a system says where a file system has no hard links, or forbids them.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class _NoHardLinksError(StorageError):
    """A file system without them."""


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise _NoHardLinksError(
            f"{path.parent}: the file system ({_file_system(path.parent)}) does not allow hard "
            f"links ({error.strerror}), which keep a second run from overwriting a finished "
            f"checkpoint; remedy: a folder on another one, such as ext4, xfs or NFS, or s3://"
        ) from error


def _file_system(path: Path) -> str:
    """The type of the file system that a path is on, and where that is mounted."""
    real = str(path.resolve())
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return kind
    for line in lines:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of several at one place, the last hides the others
            best, kind = point, found
    return f"{kind}, mounted at {best}" if best else kind


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explaining(address: str) -> Iterator[None]:
    """The system's errors as ours."""
    try:
        yield
    except StorageError:
        raise
    except FileExistsError as error:
        raise AlreadyExistsError(f"{address} exists already") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{address} is not there") from error
    except PermissionError as error:
        raise AccessDeniedError(
            f"{address}: {error.strerror}; remedy: check who owns it, and its mode"
        ) from error
    except OSError as error:
        raise StorageError(f"{address}: {error.strerror or error}") from error
