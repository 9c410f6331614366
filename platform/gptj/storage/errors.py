"""Storage errors: each message has the address, the reason and the remedy."""

from __future__ import annotations


class StorageError(OSError):
    """A read or write failed; the message has the address, the reason and the remedy.

    Subclasses: NotFoundError (no such file or bucket), AlreadyExistsError, AccessDeniedError (also
    for missing or wrong credentials), UnreachableError (no answer in time).
    """


class NotFoundError(StorageError, FileNotFoundError):
    """No such file, folder or bucket."""


class AlreadyExistsError(StorageError, FileExistsError):
    """A file that should be new already exists."""


class AccessDeniedError(StorageError, PermissionError):
    """Credentials are missing, wrong or insufficient."""


class UnreachableError(StorageError):
    """The server did not answer in time."""


def ends_early(address: str, missing: int) -> StorageError:
    return StorageError(f"{address} is truncated: {missing} bytes are missing")
