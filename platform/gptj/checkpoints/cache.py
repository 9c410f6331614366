"""A node-local disk cache of S3 checkpoints: an address and its manifest in, a local folder out.

Off unless its folder and its size are set:

    GPTJ_CACHE_FOLDER=/var/cache/gptj  GPTJ_CACHE_GB=60

The folder has one entry per checkpoint, keyed by its manifest's content, so that a checkpoint
replaced in S3 gets a new entry:

    KEY/            the files; manifest.json last, without which the entry is incomplete
    KEY.lock        shared while the entry is in use, exclusive while it is fetched or deleted;
                    its content is the entry's size in bytes, its mtime the last use
    lock            held while deciding what to evict

The least recently used entries are evicted first, never one in use. Several processes may share the
cache, and may be killed: their leftovers are counted, and fetched again or deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, FileRecord, Manifest
from gptj.checkpoints.streaming import new_parts, stream
from gptj.errors import CheckpointError
from gptj.storage.addresses import local_path
from gptj.storage.file_lock import FileLock
from gptj.storage.local import make_folder

FOLDER_VARIABLE = "GPTJ_CACHE_FOLDER"
SIZE_VARIABLE = "GPTJ_CACHE_GB"
FILES_AT_ONCE = 4
PARTS_AHEAD = 4  # of each file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Keeps an entry's folder until `close` or the end of the process."""

    folder: str
    _lock: FileLock

    def close(self) -> None:
        self._lock.close()

    def share_with(self, user: object) -> None:
        """Keep the folder until `user` is garbage-collected, even if this lease is closed."""
        # A duplicate descriptor: flock releases the lock with the last one.
        weakref.finalize(user, os.close, os.dup(self._lock.descriptor))


@dataclass(frozen=True)
class CheckpointCache:
    folder: Path
    limit: int  # bytes of all entries together

    @classmethod
    def from_environment(cls) -> CheckpointCache | None:
        """None if it is off. ValueError if only one variable is set, or one is invalid."""
        folder, size = os.environ.get(FOLDER_VARIABLE), os.environ.get(SIZE_VARIABLE)
        if not folder and not size:
            return None
        if not folder or not size:
            raise ValueError(
                f"the checkpoint cache needs both {FOLDER_VARIABLE} and {SIZE_VARIABLE}, got "
                f"{folder!r} and {size!r}"
            )
        try:
            limit = int(float(size) * 1e9)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise ValueError(f"{SIZE_VARIABLE} must be a positive number of GB, got {size!r}")
        return cls(local_path(folder), limit)

    def lease(
        self,
        address: str,
        manifest: Manifest,
        *,
        verify: bool = True,
        before_fetch: Callable[[], None] = lambda: None,
    ) -> Lease | None:
        """A folder with the checkpoint's files, fetched first if necessary.

        Files are checked against the manifest, as they arrive or, if already cached, by reading
        them; mismatches are fetched again. Returns None, and logs why, if there is no room: then
        the caller reads from S3.

        Args:
            verify: check the hashes of cached files; if False, only their sizes.
            before_fetch: called if files have to be fetched, before that; may raise.

        Raises:
            CheckpointError: if the files on S3 do not match the manifest.
            storage.StorageError: if S3 cannot be read, or the cache's folder cannot be created.
        """
        if manifest.size > self.limit:
            logger.warning(
                "%s has %d bytes, more than the cache's %d: not caching it",
                address,
                manifest.size,
                self.limit,
            )
            return None
        make_folder(self.folder)
        key = _key(manifest)
        entry = Manifest(str(self.folder / key), manifest.files)
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            if self._have(address, entry, lock, verify, before_fetch):
                os.utime(lock.descriptor)
                return Lease(entry.folder, lock)
        except BaseException:
            lock.close()
            raise
        lock.close()
        return None

    def _have(
        self,
        address: str,
        entry: Manifest,
        lock: FileLock,
        verify: bool,
        before_fetch: Callable[[], None],
    ) -> bool:
        """Make the entry complete and valid, and hold its lock shared; False if impossible."""
        while True:
            lock.share()  # waits for a process that is fetching it
            damaged = False
            if _stamp(entry) is not None:
                try:
                    entry.check_sizes()
                    if verify:
                        entry.check_files(entry.files)
                    return True
                except CheckpointError as error:
                    logger.warning("fetching %s again: %s", address, error)
                    damaged = True
            if not lock.try_take():
                if damaged:  # processes that map it may keep it for days
                    logger.warning("the damaged copy of %s is in use: reading from S3", address)
                    return False
                continue  # another process is about to fetch it
            if _stamp(entry) is not None and not damaged:
                continue  # another process has fetched it meanwhile
            before_fetch()
            if not self._make_room(entry.size, lock):
                logger.warning("no room for %s: everything in the cache is in use", address)
                return False
            if not self._fetch(address, entry, lock):
                return False
            fetched = _stamp(entry)
            lock.share()
            if _stamp(entry) == fetched:  # it was briefly unlocked, and could have been deleted
                return True

    def _make_room(self, size: int, own: FileLock) -> bool:
        """Evict least recently used entries and reserve `size`; False if all are in use."""
        with FileLock(self.folder / "lock") as deciding:
            deciding.take()
            shutil.rmtree(own.path.with_suffix(""), ignore_errors=True)
            others = [path for path in self.folder.glob("*.lock") if path != own.path]
            left = self.limit - size - sum(_reserved(path) for path in others)
            for path in sorted(others, key=_staleness):
                if left >= 0:
                    break
                with FileLock(path) as lock:
                    if lock.try_take():
                        left += _reserved(path)
                        _delete(lock)
            if left < 0:
                return False
            _reserve(own, size)
            return True

    def _fetch(self, address: str, entry: Manifest, lock: FileLock) -> bool:
        """Copy the files, checking each as it arrives; False if the disk is full."""

        def fetch_one(name: str) -> None:
            path = Path(entry.folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            record = _copy(storage.join(address, name), path, entry.files[name].size)
            if record != entry.files[name]:
                Manifest(address, entry.files).check_content(name, record.size, record.sha256)

        try:
            Path(entry.folder).mkdir()
            storage.for_each(fetch_one, entry.files, FILES_AT_ONCE)
            entry.write()
        except (CheckpointError, storage.StorageError):
            _delete(lock)
            raise
        except OSError as error:
            _delete(lock)
            logger.warning("cannot cache %s in %s: %s", address, self.folder, error)
            return False
        return True


def _key(manifest: Manifest) -> str:
    return manifest.digest[:32]


def _stamp(entry: Manifest) -> tuple[int, int] | None:
    """Identifies one complete copy of an entry; None if the entry is incomplete."""
    try:
        status = Path(entry.folder, MANIFEST).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _staleness(lock: Path) -> tuple[bool, int]:
    """Sort key: leftovers of killed processes first, then by last use."""
    return (lock.with_suffix("") / MANIFEST).exists(), lock.stat().st_mtime_ns


def _reserved(lock: Path) -> int:
    """Bytes reserved for an entry."""
    text = lock.read_text()
    return int(text) if text.isdecimal() else 0


def _reserve(lock: FileLock, size: int) -> None:
    os.ftruncate(lock.descriptor, 0)
    if size:
        os.pwrite(lock.descriptor, str(size).encode(), 0)


def _delete(lock: FileLock) -> None:
    """Delete an entry; the caller holds its lock exclusively."""
    shutil.rmtree(lock.path.with_suffix(""), ignore_errors=True)
    _reserve(lock, 0)


def _copy(address: str, path: Path, size: int) -> FileRecord:
    """Write an S3 object to a local file; returns its size and SHA-256."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(PARTS_AHEAD) as fetchers, path.open("wb") as file:
        for part in stream(address, 0, new_parts(size), fetchers, PARTS_AHEAD):
            file.write(part[0])
            digest.update(part[0])
    return FileRecord(size, digest.hexdigest())
