"""Temporary folders that are cleaned up even if their process is killed.

Python's tempfile leaves its folders behind when a process is killed, and a worker's part of a 6B
checkpoint is tens of gigabytes. Here all of a user's temporary folders share a parent, and creating
a new one first deletes those whose owner is gone.

    GPTJ_SCRATCH_GB=180

says how much they may hold together where the file system does not: a pod's volume with a size
limit reports the whole disk's room, and the kubelet evicts the pod once it holds more.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptj.storage.addresses import local_path
from gptj.storage.file_lock import FileLock
from gptj.storage.local import make_folder

logger = logging.getLogger(__name__)

LOCK = "lock"
LIMIT_VARIABLE = "GPTJ_SCRATCH_GB"


class InvalidLimitError(ValueError):
    """GPTJ_SCRATCH_GB is not a positive number."""


@contextmanager
def scratch_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """A new empty folder, deleted at the end of the block.

    Args:
        parent: where to create it; None: the system's temporary folder.

    Raises:
        AddressError: if the parent is not a local path.
        StorageError: if it cannot be created.
        PermissionError: if another user owns the folder that would contain it.
    """
    root = _root(parent)
    # Exclusive, so that nobody finds a folder before its owner has locked it.
    with FileLock(root / LOCK) as alone:
        alone.take()
        _delete_abandoned(root)
        folder = Path(tempfile.mkdtemp(dir=root))
        held = FileLock(folder / LOCK)
        held.take()
    with held:
        content = folder / "content"
        content.mkdir()
        try:
            yield content
        finally:
            shutil.rmtree(content)
            with FileLock(root / LOCK) as alone:  # as _delete_abandoned expects
                alone.take()
                shutil.rmtree(folder)


@contextmanager
def shared_scratch_folder(
    name: str,
    parent: str | Path | None = None,
    *,
    on_abandoned: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """A named folder shared by this node's processes, deleted when the last one leaves.

    Other arguments and errors as for scratch_folder.

    Args:
        on_abandoned: receives a folder of this name whose users were all killed, before anyone
            else can enter it; None: it is deleted.
    """
    root = _root(parent)
    folder = root / f"shared-{name}"
    with FileLock(root / LOCK) as alone:
        alone.take()
        _delete_abandoned(root, kept=None if on_abandoned is None else folder)
        abandoned = folder.is_dir() and _is_abandoned(folder)
        (folder / "content").mkdir(parents=True, exist_ok=True)
        if abandoned and on_abandoned is not None:
            on_abandoned(folder / "content")
        held = FileLock(folder / LOCK)
        held.share()
    try:
        yield folder / "content"
    finally:
        held.close()
        with FileLock(root / LOCK) as alone:
            alone.take()
            _delete_if_abandoned(folder)


def room_limit() -> int | None:
    """Bytes that the system's temporary folder's scratch folders may take; None: no limit.

    InvalidLimitError if GPTJ_SCRATCH_GB is not a positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return None
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise InvalidLimitError(f"{LIMIT_VARIABLE} must be a positive number of GB, got {text!r}")
    return limit


def room_left(limit: int) -> int:
    """Bytes of the limit that the system's temporary folder's scratch folders have not taken."""
    return max(0, limit - _bytes_in(_root(None)))


def _bytes_in(folder: Path) -> int:
    """What the files below a folder take up, while others may delete some."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def _root(parent: str | Path | None) -> Path:
    root = local_path(parent or tempfile.gettempdir()) / f"gptj-scratch-{os.getuid()}"
    make_folder(root, mode=0o700)
    owner = root.stat().st_uid
    if owner != os.getuid():
        raise PermissionError(f"{root} belongs to user {owner}; remedy: delete it, or set TMPDIR")
    return root


def _delete_abandoned(root: Path, kept: Path | None = None) -> None:
    for folder in root.iterdir():
        if folder != kept and _delete_if_abandoned(folder):
            logger.info("deleted %s, left by a process that was killed", folder)


def _delete_if_abandoned(folder: Path) -> bool:
    """Delete a folder nobody holds. The caller holds the root's lock, so nobody can take it."""
    if not folder.is_dir() or not _is_abandoned(folder):
        return False
    shutil.rmtree(folder)
    return True


def _is_abandoned(folder: Path) -> bool:
    with FileLock(folder / LOCK) as lock:
        return lock.try_take()
