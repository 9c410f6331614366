"""Files on a local disk, written atomically."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO

from gptj.storage.addresses import local_path
from gptj.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    ends_early,
)
from gptj.storage.listing import FileInfo, every

COPY_BYTES = 16 * 2**20
_UNFINISHED = ".unfinished"


def exists(address: str) -> bool:
    with explaining(address):
        return local_path(address).is_file()


def size(address: str) -> int:
    with explaining(address):
        return local_path(address).stat().st_size


def stat(address: str) -> FileInfo:
    path = local_path(address)
    with explaining(address):
        return _described(path, path.name, path.stat())


def list_files(
    folder: str, chosen: Callable[[str], bool] = every, *, follow_links: bool = True
) -> list[FileInfo]:
    return sorted(_below(local_path(folder), chosen, follow_links), key=lambda file: file.name)


def _below(
    folder: Path,
    chosen: Callable[[str], bool],
    follow_links: bool,
    prefix: str = "",
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[FileInfo]:
    """The chosen files below a folder, in linked folders too if `follow_links`.

    None may be missing unnoticed: what cannot be read is an error, what others delete meanwhile is
    not.

    Args:
        above: the folders that this one is in, by device and inode.
    """
    try:
        with explaining(str(folder)):
            status = folder.stat()
            with os.scandir(folder) as listing:
                entries = list(listing)
    except NotFoundError:
        return
    except AccessDeniedError:
        if folder.name == "lost+found":  # the file system's own, at its root
            return
        raise
    if (here := (status.st_dev, status.st_ino)) in above:  # by a link to a folder that it is in
        return
    for entry in entries:
        name = prefix + entry.name
        as_file, as_folder = chosen(name), chosen(f"{name}/")
        if not as_file and not as_folder:
            continue
        try:
            with explaining(entry.path):
                found = entry.stat()
        except StorageError as error:
            linked = os.path.islink(entry.path)
            if linked and not follow_links:
                continue
            if not isinstance(error, NotFoundError):
                raise
            if linked:
                raise StorageError(
                    f"{entry.path} is a broken link to {os.readlink(entry.path)}; remedy: restore "
                    f"that, or delete the link"
                ) from error
            continue
        if S_ISDIR(found.st_mode):
            if as_folder and (follow_links or not entry.is_symlink()):
                inside, within = folder / entry.name, above | {here}
                yield from _below(inside, chosen, follow_links, f"{name}/", within)
        elif S_ISREG(found.st_mode) and as_file and not name.endswith(_UNFINISHED):
            yield _described(folder / entry.name, name, found)


def _described(path: Path, name: str, found: os.stat_result) -> FileInfo:
    return FileInfo(str(path), name, found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")


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


def read_scattered(address: str, start: int, targets: Sequence[memoryview]) -> None:
    for target in targets:
        read_into(address, start, target)
        start += len(target)


@contextmanager
def open_read(address: str, buffer_bytes: int = 0) -> Iterator[IO[bytes]]:
    """The file system reads ahead by itself."""
    with explaining(address), local_path(address).open("rb") as file:
        yield file


def write_bytes(address: str, content: bytes, *, if_absent: bool) -> None:
    with open_write(address, if_absent=if_absent) as file:
        file.write(content)


@contextmanager
def open_write(
    address: str, expected_size: int | None = None, *, if_absent: bool
) -> Iterator[IO[bytes]]:
    """Write to a temporary file beside the path; sync and move it there at the end."""
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


def download(address: str, path: Path) -> None:
    """Copy a file to another path."""
    with open_read(address) as source, open_write(str(path), if_absent=False) as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def upload(path: Path, address: str) -> None:
    make_folder(local_path(address).parent)
    download(str(path), local_path(address))


def delete(address: str) -> None:
    with explaining(address):
        local_path(address).unlink(missing_ok=True)


def delete_folder(address: str) -> None:
    path = local_path(address)
    with explaining(address):
        if path.is_symlink():  # what it leads to is not ours to delete
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def delete_unfinished(folder: str, chosen: Callable[[str], bool]) -> None:
    """Delete temporary files below a folder, left by writers that were killed."""
    root = local_path(folder)
    for parent, _, names in os.walk(root):  # passes over what others delete meanwhile
        for path in (Path(parent, name) for name in names if name.endswith(_UNFINISHED)):
            written = path.with_name(path.name.removesuffix(_UNFINISHED).rpartition(".")[0])
            if chosen(written.relative_to(root).as_posix()):
                delete(str(path))


def check_writable(folder: str) -> None:
    """Write a small file like a long job will at its end, then delete it; the folder stays.

    StorageError if that fails.
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
    """Create a folder and its parents. The StorageError names the one that cannot be created."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
    except OSError as error:
        raise _KINDS.get(type(error), StorageError)(_unwritable(path, error)) from error


_KINDS: dict[type[OSError], type[StorageError]] = {PermissionError: AccessDeniedError}


def _unwritable(folder: Path, error: BaseException | None) -> str:
    """Explain why a folder is not writable, from its nearest existing parent."""
    above = folder
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    reason = error.strerror if isinstance(error, OSError) else str(error)
    if above.is_symlink() and not above.exists():
        reason, remedy = f"{above} is a broken link", "delete the link"
    elif not above.is_dir():
        reason, remedy = f"{above} is a file, not a folder", "choose another folder"
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
    return f"cannot write to {folder}: {reason}; remedy: {remedy}"


# What os.link raises where a file system lacks hard links or forbids them.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class _NoHardLinksError(StorageError):
    """The file system has no hard links."""


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
    """The type and mount point of a path's file system."""
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
        if inside and len(point) >= len(best):  # >=: a later mount hides earlier ones
            best, kind = point, found
    return f"{kind}, mounted at {best}" if best else kind


def _sync_folder(folder: Path) -> None:
    """Sync a folder: until then a new name in it may not survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explaining(address: str) -> Iterator[None]:
    """Translate OSErrors into ours."""
    try:
        yield
    except StorageError:
        raise
    except FileExistsError as error:
        raise AlreadyExistsError(f"{address} already exists") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{address} does not exist") from error
    except PermissionError as error:
        raise AccessDeniedError(
            f"{address}: {error.strerror}; remedy: check its owner and mode"
        ) from error
    except OSError as error:
        raise StorageError(f"{address}: {error.strerror or error}") from error
