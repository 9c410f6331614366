"""Locks between the processes of a node, released when a process ends, even by SIGKILL.

They use flock on files that are never deleted: deleting one while a process waits for it would
turn one lock into two.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class FileLock:
    """A lock held shared by many or exclusively by one. Its folder must exist.

    Each object is a separate holder, even within one process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def share(self) -> None:
        """Acquire shared, blocking. Releases what this object held before."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def take(self) -> None:
        """Acquire exclusively, blocking."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def try_take(self) -> bool:
        """Acquire exclusively without blocking; on False, any lock held before is released too."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            return False
        return True

    def close(self) -> None:
        """Release; idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def turn(folder: Path, at_once: int) -> Iterator[None]:
    """Hold one of `at_once` slots in a folder for the block, waiting until one is free.

    Callers with different numbers share the lower-numbered slots. ValueError if at_once is not
    positive.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be 1 or more, got {at_once}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = time.monotonic()
    while (place := _free_place(folder, at_once)) is None:
        time.sleep(POLL_SECONDS)
    if (waited := time.monotonic() - start) > 1:
        logger.info("waited %.1f s for one of %d slots in %s", waited, at_once, folder)
    with place:
        yield


def _free_place(folder: Path, at_once: int) -> FileLock | None:
    for number in range(at_once):
        lock = FileLock(folder / f"place-{number}")
        if lock.try_take():
            return lock
        lock.close()
    return None
