"""S3 objects: bytes in, bytes out, through boto3."""

from __future__ import annotations

import http.client
import io
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from boto3.exceptions import RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from gptj.storage import local
from gptj.storage.addresses import join, split_s3
from gptj.storage.errors import (
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    UnreachableError,
    ends_early,
)
from gptj.storage.listing import FileInfo, every, is_chosen
from gptj.storage.parallel import PARALLEL, PART_BYTES, for_each
from gptj.storage.s3_client import (
    OTHER_SERVER,
    bucket_exists,
    client,
    endpoint,
    explaining,
    is_out_of_range,
    no_bucket,
    retry_policy,
)
from gptj.storage.s3_upload import (
    MAX_PARTS,
    WRITE_PART_BYTES,
    MultipartUpload,
    StreamingUpload,
    put_once,
    upload_file,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

logger = logging.getLogger(__name__)

_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL
)


def exists(address: str) -> bool:
    try:
        size(address)
    except NotFoundError:
        return False
    return True


def size(address: str) -> int:
    return stat(address).size


def stat(address: str) -> FileInfo:
    bucket, key = split_s3(address)
    with explaining(bucket, key):
        found = client().head_object(Bucket=bucket, Key=key)
    name = key.rpartition("/")[2]
    return FileInfo(f"s3://{bucket}/{key}", name, found["ContentLength"], found.get("ETag", ""))


def list_files(
    folder: str, chosen: Callable[[str], bool] = every, *, follow_links: bool = True
) -> list[FileInfo]:
    bucket, key = split_s3(folder)
    prefix = f"{key}/" if key else ""
    files = []
    with explaining(bucket, key):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(prefix)
                # Some servers list folders too.
                if name and not name.endswith("/") and is_chosen(name, chosen):
                    found = f"s3://{bucket}/{item['Key']}"
                    files.append(FileInfo(found, name, item["Size"], item.get("ETag", "")))
    return sorted(files, key=lambda file: file.name)


def read_start(address: str, length: int) -> tuple[bytes, int]:
    bucket, key = split_s3(address)
    start, size = bytearray(), 0

    def read() -> None:
        nonlocal start, size
        try:
            with explaining(bucket, key):
                reply = client().get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{length - 1}")
        except StorageError as error:
            if not is_out_of_range(error.__cause__):
                raise
            start, size = bytearray(), 0  # an empty file
            return
        size = int(reply["ContentRange"].rpartition("/")[2])
        start = bytearray(min(length, size))
        with explaining(bucket, key):
            _receive(reply, [memoryview(start)], address)

    _retrying(read)
    return bytes(start), size


def read_into(address: str, start: int, target: memoryview) -> None:
    """Like gptj.storage.read_into, in parallel requests."""
    parts = range(0, len(target), PART_BYTES)
    for_each(
        lambda offset: read_scattered(
            address, start + offset, [target[offset : offset + PART_BYTES]]
        ),
        parts,
    )


def read_scattered(address: str, start: int, targets: Sequence[memoryview]) -> None:
    """Fill several buffers in order from an object, starting at byte `start`, in one request.

    StorageError if the object ends before all are full.
    """
    bucket, key = split_s3(address)
    end = start + sum(len(each) for each in targets) - 1

    def read() -> None:
        with explaining(bucket, key):
            reply = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end}")
            _receive(reply, targets, address)

    _retrying(read)


@contextmanager
def open_read(address: str, buffer_bytes: int) -> Iterator[IO[bytes]]:
    file = _S3File(address, size(address))
    with io.BufferedReader(file, buffer_size=buffer_bytes) as buffer:
        yield buffer


def write_bytes(address: str, content: bytes, *, if_absent: bool) -> None:
    put_once(address, content, if_absent=if_absent)


@contextmanager
def open_write(address: str, expected_size: int | None, *, if_absent: bool) -> Iterator[IO[bytes]]:
    part_bytes = max(WRITE_PART_BYTES, -(-(expected_size or 0) // MAX_PARTS))
    upload = StreamingUpload(address, part_bytes, if_absent=if_absent)
    try:
        yield upload  # type: ignore[misc]  # callers only need write()
    except BaseException:
        upload.abort()
        raise
    upload.finish()


def download(address: str, path: Path) -> None:
    bucket, key = split_s3(address)

    def fetch() -> None:
        try:
            with explaining(bucket, key):
                client().download_file(bucket, key, str(path), Config=_TRANSFER)
        except UnreachableError as error:
            if isinstance(error.__cause__, RetriesExceededError):  # boto3's own retries do not wait
                raise _BrokenError(str(error)) from error
            raise

    _retrying(fetch)


def upload(path: Path, address: str) -> None:
    bucket, key = split_s3(address)
    if (length := local.size(str(path))) > PART_BYTES:
        upload_file(path, address, length, PART_BYTES)
        return
    with local.open_read(str(path)) as file, explaining(bucket, key):
        client().put_object(Bucket=bucket, Key=key, Body=file)


def delete(address: str) -> None:
    _delete_key(*split_s3(address))


def _delete_key(bucket: str, key: str) -> None:
    with explaining(bucket, key):
        client().delete_object(Bucket=bucket, Key=key)


def delete_folder(address: str) -> None:
    bucket, key = split_s3(address)
    if not key:
        raise ValueError(f"refusing to empty the whole bucket {bucket}")
    prefix = f"s3://{bucket}/"
    _delete_keys(bucket, [file.address.removeprefix(prefix) for file in list_files(address)])


def delete_unfinished(folder: str, chosen: Callable[[str], bool]) -> None:
    """Abort unfinished multipart uploads into a folder, to free their storage.

    Only warns if these credentials may not: nothing depends on it.
    """
    bucket, key = split_s3(folder)
    prefix = f"{key}/" if key else ""
    try:
        with explaining(bucket, key):
            pages = client().get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix):
                for upload in page.get("Uploads", []):
                    if not chosen(upload["Key"].removeprefix(prefix)):
                        continue
                    logger.info(
                        "aborting an unfinished upload of s3://%s/%s", bucket, upload["Key"]
                    )
                    client().abort_multipart_upload(
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
    except StorageError as error:
        logger.warning("cannot abort unfinished uploads: %s", error)


def check_writable(folder: str) -> None:
    """Write two small files like a long job will at its end, then delete them.

    StorageError if the server or the credentials do not allow it.
    """
    bucket, key = split_s3(folder)
    with explaining(bucket, key):
        if not bucket_exists(bucket):  # some servers create it on the first write
            raise no_bucket(bucket, key)
    probe = join(folder, f".writable-{secrets.token_hex(8)}")
    written = []
    try:
        write_bytes(probe, b"new", if_absent=True)
        written.append(probe)
        try:
            write_bytes(probe, b"newer", if_absent=True)
        except AlreadyExistsError:
            pass  # as expected; this is what keeps two writers of a checkpoint apart
        else:
            raise StorageError(
                f"{folder}: {endpoint()} ignores If-None-Match, and so would let a second run "
                f"overwrite a finished checkpoint; {OTHER_SERVER}"
            )
        in_parts = probe + "-in-parts"
        upload = MultipartUpload(in_parts, if_absent=True)
        written.append(in_parts)
        upload.complete([upload.send(1, b"new")])
    except BaseException:
        with suppress(StorageError):  # the first error matters more
            _delete_keys(bucket, [split_s3(each)[1] for each in written])
        raise
    _delete_keys(bucket, [split_s3(each)[1] for each in written])


# Fall back to one key per request, for servers without batch deletes or that require an MD5
# checksum, which boto3 no longer sends.
_NO_BATCH_DELETE = ("MissingContentMD5", "NotImplemented", "501", "MethodNotAllowed", "405")
# Characters that the XML of a batch delete cannot have, or changes.
_NOT_IN_XML = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\ud800-\udfff\ufffe\uffff]")


def _delete_keys(bucket: str, keys: Sequence[str]) -> None:
    odd = [key for key in keys if _NOT_IN_XML.search(key)]
    for_each(partial(_delete_key, bucket), odd)
    plain = [key for key in keys if _NOT_IN_XML.search(key) is None]
    for start in range(0, len(plain), 1000):  # S3's limit for a request
        batch = plain[start : start + 1000]
        try:
            with explaining(bucket, batch[0]):
                failed = _delete_batch(bucket, batch)
        except StorageError as error:
            if not _lacks_batch_delete(error.__cause__):
                raise
            failed = list(batch)
        for_each(partial(_delete_key, bucket), failed)


def _lacks_batch_delete(error: BaseException | None) -> bool:
    if not isinstance(error, ClientError):
        return False
    found = error.response.get("Error", {})
    return (
        found.get("Code", "") in _NO_BATCH_DELETE
        or "content-md5" in found.get("Message", "").lower()
    )


def _delete_batch(bucket: str, keys: Sequence[str]) -> list[str]:
    """Delete keys in one request; returns those that failed, which may succeed on a retry."""
    reply = client().delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
    )
    return [error["Key"] for error in reply.get("Errors", [])]


class _S3File(io.RawIOBase):
    """An S3 object as a file, read with range requests."""

    def __init__(self, address: str, length: int) -> None:
        self._address = address
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self._length - self._position)]
        if len(target):
            read_into(self._address, self._position, target)
            self._position += len(target)
        return len(target)


def _receive(reply: GetObjectOutputTypeDef, targets: Sequence[memoryview], address: str) -> None:
    """Fill the targets with the body of an S3 reply.

    Reads straight from http.client, below urllib3 and botocore: those copy what they read while
    holding the GIL, which would serialize parallel requests.
    """
    size = sum(len(each) for each in targets)
    if (length := reply["ContentLength"]) < size:
        raise ends_early(address, size - length)
    received = 0
    with closing(reply["Body"]) as body:
        response: Any = body._raw_stream  # type: ignore[attr-defined]
        try:
            for target in targets:
                filled = 0
                while filled < len(target):
                    read = response._fp.readinto(target[filled:])
                    if not read:
                        raise _broken(address, received, size, "closed by the server")
                    filled += read
                    received += read
            response.read(1)  # drain, so that the connection can be reused
        except StorageError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _broken(address, received, size, repr(error)) from error


class _BrokenError(UnreachableError):
    """The connection broke in the middle of a body, which the client does not retry itself."""


def _retrying(action: Callable[[], None]) -> None:
    """Retry the action while connections break, for as long as the retry policy allows."""
    first_failure = 0.0
    for attempts in count(1):
        try:
            return action()
        except _BrokenError as error:
            first_failure = first_failure or time.monotonic()
            pause = retry_policy().pause(attempts, first_failure, str(error))
            if pause is None:
                raise
            time.sleep(pause)


def _broken(address: str, received: int, size: int, reason: str) -> _BrokenError:
    return _BrokenError(
        f"{address}: the connection to {endpoint()} broke after {received} of {size} bytes "
        f"({reason}); remedy: check the network"
    )
