"""Files on a disk: what is written appears as a whole or not at all."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gptj.addresses import local_path
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
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                os.link(unfinished, path)  # unlike a rename, this refuses an existing file
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
