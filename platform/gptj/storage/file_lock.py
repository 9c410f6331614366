"""Locks between the processes of a node: whoever ends, even by SIGKILL, has let go of them.

They are flock's, on files that stay where they are: a file that was deleted while somebody waits
for it would make two locks of one.
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
    """A lock that many may share, or one has alone. Its folder must be there.

    Each object is a holder of its own, also within a process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def share(self) -> None:
        """Wait until nobody has it alone. What was held before is let go of first."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def take(self) -> None:
        """Wait until nobody else holds it."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def try_take(self) -> bool:
        """Have it alone at once, or not at all: then nothing is held, whatever was before."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            return False
        return True

    def close(self) -> None:
        """Let go; nothing happens the second time."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def turn(folder: Path, at_once: int) -> Iterator[None]:
    """Wait for one of `at_once` places in a folder, and hold it for the length of the block.

    Those that state different numbers share the places that both know. ValueError if at_once is
    not positive.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be 1 or more, got {at_once}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = time.monotonic()
    while (place := _free_place(folder, at_once)) is None:
        time.sleep(POLL_SECONDS)
    if (waited := time.monotonic() - start) > 1:
        logger.info("waited %.1f s for one of %d places in %s", waited, at_once, folder)
    with place:
        yield


def _free_place(folder: Path, at_once: int) -> FileLock | None:
    for number in range(at_once):
        lock = FileLock(folder / f"place-{number}")
        if lock.try_take():
            return lock
        lock.close()
    return None
