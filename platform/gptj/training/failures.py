"""Which errors end a run, because a retry cannot succeed.

A dead worker or an unreachable server is worth a retry. Invalid settings, changed data, a damaged
checkpoint, divergence or a full disk are not.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptj.data.sources import DataError
from gptj.errors import CheckpointError
from gptj.storage import AccessDeniedError, AlreadyExistsError, NotFoundError
from gptj.storage.lease import LeaseLostError
from gptj.storage.scratch import InvalidLimitError
from gptj.training.settings import SettingsError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 8 * 2**20
DISK_REMEDY = (
    "remedy: free space there, or set TMPDIR for the workers to a folder with room for each "
    "worker's part of a checkpoint"
)
LIMIT_REMEDY = (
    "remedy: enlarge the volume of temporary files together with GPTJ_SCRATCH_GB, or spread the "
    "workers over more nodes"
)
EXAMPLES_LIMIT_REMEDY = (  # each node holds all of them
    "remedy: enlarge the volume of temporary files together with GPTJ_SCRATCH_GB"
)
EXAMPLES_REMEDY = (
    "remedy: free space there, or set TMPDIR on each node to a folder with room for the data's "
    "tokens, four or five bytes each"
)


class UnrecoverableError(Exception):
    """A retry would fail too; the message has the cause and the remedy."""


class DivergedError(UnrecoverableError):
    """A loss, a gradient or a weight is not finite; the message names the step."""


class StoppedError(UnrecoverableError):
    """The run was told to stop, and can resume; the message has the checkpoint.

    Attributes:
        reason: the same on all ranks, whichever of them was told to stop.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class DiskFullError(UnrecoverableError):
    """No room for temporary files or results; the message names the folder."""


_SAME_AGAIN = (
    UnrecoverableError,
    SettingsError,
    DataError,
    CheckpointError,
    NotFoundError,
    AlreadyExistsError,
    AccessDeniedError,
    LeaseLostError,
    InvalidLimitError,
)


def unrecoverable(error: BaseException) -> str | None:
    """The error's message if a retry would fail too, else None."""
    if isinstance(error, _SAME_AGAIN):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return f"the disk is full: {error}"
        cause = cause.__cause__
    return None


@contextmanager
def naming_full_disk(
    folder: Path, needed: int | None = None, remedy: str = DISK_REMEDY
) -> Iterator[None]:
    """Raise DiskFullError if the block fails because the disk of `folder` is full.

    PyTorch's writers only report a broken stream, so this probes the disk itself.

    Args:
        needed: bytes that the block writes there, if known.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(folder):
            raise
        usage = shutil.disk_usage(folder)
        # The block's files so far are deleted with the folder, so count them as free.
        written = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        wanted = "" if needed is None else f": {gigabytes(needed)} are needed there"
        raise DiskFullError(
            f"the disk of {folder}, {gigabytes(usage.total)} in all, is full{wanted}"
            f"{' and' if wanted else ':'} {gigabytes(usage.free + written)} are available; "
            f"{remedy}"
        ) from error


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _is_full(folder: Path) -> bool:
    """Whether writing a few megabytes fails for lack of space."""
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno in _FULL
    finally:
        probe.unlink(missing_ok=True)
    return False
