"""A lease on a folder, local or on S3: one holder at a time, which may die without releasing it.

The folder has a file for each generation, `00000001.json` and so on, created only if absent, so
that only one of several processes can take over an expired lease. The holder renews its file every
few seconds. A process that sees it unchanged for a whole term, by its own clock, takes over; clocks
are never compared. On the holder's own machine, its process is looked up instead.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from gptj import storage
from gptj.environment.processes import identity

logger = logging.getLogger(__name__)

TERM_SECONDS = 60.0
RENEWALS = 6  # per term
MAX_TERMS = 10  # of waiting for a storage that takes long to answer: longer than our retries


class LeaseHeldError(Exception):
    """Another process holds the lease; the message says where."""


class LeaseLostError(Exception):
    """Another process has taken over: this one must no longer write."""


@dataclass(frozen=True)
class _Record:
    owner: str
    host: str
    process: int
    machine: str  # the process's identity, to tell whether it is alive
    renewed: int = 0
    released: bool = False


@dataclass(frozen=True)
class Claim:
    """What a holder passes to processes that work for it; plain, picklable values."""

    folder: str
    generation: int
    owner: str

    def check(self) -> None:
        """LeaseLostError if another process has taken over, or the claims have been removed.

        A node may see a shared folder's new files late: an older generation proves nothing.
        """
        newest = _newest(self.folder)
        if newest > self.generation or newest == 0:
            raise LeaseLostError(
                f"another process has taken over, according to {self.folder} (generation {newest}, "
                f"ours was {self.generation}): this one must no longer write"
            )


def take_over(folder: str, token: tuple[int, ...] = ()) -> Claim:
    """Claim a folder at once, whoever has it: `check` fails for all earlier claims.

    Args:
        folder: holds only such claims.
        token: a fencing token: never takes over from a claim with a larger one, however late this
            process is.

    Raises:
        LeaseLostError: if a claim has a larger token.
    """
    owner = secrets.token_hex(16)
    while True:
        newest = _newest(folder)
        larger = _token(folder, newest) if newest else ()
        if larger is None:
            continue  # deleted by a newer claim
        if larger > token:
            raise LeaseLostError(
                f"a process that was started later has already taken over, according to {folder} "
                f"(generation {newest}, with the token {larger}, ours is {token}): this one must "
                f"not write any more; if no such process is running, delete {folder}"
            )
        try:
            fields = {"owner": owner, "token": token}
            return Claim(folder, _write_next(folder, newest, fields), owner)
        except storage.AlreadyExistsError:
            continue  # another process was faster


class Lease:
    """A lease, renewed by a thread until it is released.

    Args:
        folder: holds only the lease's files.
        term: seconds without renewal after which others take over.

    Raises:
        LeaseHeldError: if its holder is alive.
        StorageError: if the folder cannot be read or written.
    """

    def __init__(self, folder: str, *, term: float = TERM_SECONDS) -> None:
        self._record = _Record(
            owner=secrets.token_hex(16),
            host=socket.gethostname(),
            process=os.getpid(),
            machine=identity(os.getpid()) or "",
        )
        self._term = term
        self._ended = threading.Event()
        self.claim = Claim(folder, self._acquire(folder), self._record.owner)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others acquire it at once; idempotent."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            self.claim.check()
            self._write(replace(self._record, released=True))
        except (LeaseLostError, OSError) as error:
            logger.warning("cannot record the end in %s: %s", self.claim.folder, error)

    def _acquire(self, folder: str) -> int:
        while True:
            newest = _newest(folder)
            if newest:
                self._wait_until_free(folder, newest)
            try:
                return _write_next(folder, newest, asdict(self._record))
            except storage.AlreadyExistsError:
                continue  # another process was faster

    def _wait_until_free(self, folder: str, generation: int) -> None:
        first = _read(folder, generation)
        if first is None or first.released or _is_dead(first):
            return
        logger.info(
            "process %d on %s may still be using %s; waiting up to %.0f s for a sign of life",
            first.process,
            first.host,
            folder,
            self._term,
        )
        began, unchanged = time.monotonic(), 0.0  # seconds
        while unchanged < self._term:
            since = time.monotonic()
            time.sleep(self._term / RENEWALS / 4)
            now = _read(folder, generation)
            if now is None or now.released:
                return
            if now != first:
                raise LeaseHeldError(f"process {now.process} on {now.host} is still running")
            took = time.monotonic() - since
            if time.monotonic() - began > MAX_TERMS * self._term:
                raise storage.StorageError(
                    f"{folder} takes too long to read ({took:.0f} s the last time) to tell whether "
                    f"process {first.process} on {first.host} still uses it; remedy: try again "
                    f"when the storage answers faster"
                )
            # A holder cannot renew while the storage is down: it gets a full term afterwards.
            unchanged = 0.0 if took > self._term / 2 else unchanged + took

    def _renew(self) -> None:
        while not self._ended.wait(self._term / RENEWALS):
            try:
                self.claim.check()
                self._record = replace(self._record, renewed=self._record.renewed + 1)
                self._write(self._record)
            except LeaseLostError as error:
                logger.error("%s", error)
                return
            except OSError as error:  # the storage's and others'; the next time it may work
                logger.warning(
                    "cannot record in %s that this process runs: %s", self.claim.folder, error
                )

    def _write(self, record: _Record) -> None:
        address = _address(self.claim.folder, self.claim.generation)
        storage.write_bytes(address, json.dumps(asdict(record)).encode())


def _address(folder: str, generation: int) -> str:
    return storage.join(folder, f"{generation:08}.json")


def _write_next(folder: str, newest: int, fields: dict[str, Any]) -> int:
    """Create and return the next generation. AlreadyExistsError if another process was faster."""
    address = _address(folder, newest + 1)
    storage.write_bytes(address, json.dumps(fields).encode(), if_absent=True)
    for generation in range(1, newest):  # keep the newest, to tell a late holder it lost
        storage.delete(_address(folder, generation))
    return newest + 1


def _newest(folder: str) -> int:
    """The newest generation; 0 if there is none."""
    names = [Path(file.name) for file in storage.list_files(folder)]
    return max((int(name.stem) for name in names if name.stem.isdigit()), default=0)


def _read(folder: str, generation: int) -> _Record | None:
    fields = _read_fields(folder, generation)
    return None if fields is None else _Record(**fields)


def _token(folder: str, generation: int) -> tuple[int, ...] | None:
    """A claim's fencing token; None if there is no such claim."""
    fields = _read_fields(folder, generation)
    return None if fields is None else tuple(fields.get("token", ()))  # versions before had none


def _read_fields(folder: str, generation: int) -> dict[str, Any] | None:
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(_address(folder, generation)))
    except storage.NotFoundError:
        return None
    return fields


def _is_dead(record: _Record) -> bool:
    """Whether the holder was a process of this machine and has ended."""
    here = identity(os.getpid())
    if here is None or record.machine.rpartition(" ")[0] != here.rpartition(" ")[0]:
        return False
    return identity(record.process) != record.machine
