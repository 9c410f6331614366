"""What can go wrong with storage: each error has the address, the reason and the remedy."""

from __future__ import annotations


class StorageError(OSError):
    """Reading or writing failed; the message has the address, the reason and the remedy.

    Its kinds: NotFoundError (no such file, or bucket), AlreadyExistsError, AccessDeniedError (also
    for missing or wrong credentials), UnreachableError (no answer in time).
    """


class NotFoundError(StorageError, FileNotFoundError):
    """No such file, folder or bucket."""


class AlreadyExistsError(StorageError, FileExistsError):
    """A file that was to be new is there already."""


class AccessDeniedError(StorageError, PermissionError):
    """No credentials, wrong ones, or ones that do not allow this."""


class UnreachableError(StorageError):
    """The server gave no answer in time."""


def ends_early(address: str, missing: int) -> StorageError:
    return StorageError(f"{address} ends {missing} bytes before it should: it is cut off")
