"""Objects of S3: bytes in, bytes out, through boto3."""

from __future__ import annotations

import http.client
import io
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig

from gptj.addresses import split_s3
from gptj.storage import local
from gptj.storage.errors import NotFoundError, StorageError, UnreachableError, ends_early
from gptj.storage.listing import FileInfo
from gptj.storage.parallel import PARALLEL, for_each
from gptj.storage.s3_client import TRIES, client, endpoint, explaining
from gptj.storage.s3_upload import MAX_PARTS, WRITE_PART_BYTES, MultipartUpload

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

PART_BYTES = 16 * 2**20  # of a multipart transfer
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
    bucket, key = split_s3(address)
    with explaining(bucket, key):
        return client().head_object(Bucket=bucket, Key=key)["ContentLength"]


def list_files(folder: str) -> list[FileInfo]:
    bucket, key = split_s3(folder)
    prefix = f"{key}/" if key else ""
    files = []
    with explaining(bucket, key):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):  # some servers list folders too
                    files.append(FileInfo(f"s3://{bucket}/{item['Key']}", name, item["Size"]))
    return sorted(files, key=lambda file: file.name)


def read_into(address: str, start: int, target: memoryview) -> None:
    """By parallel requests."""
    parts = range(0, len(target), PART_BYTES)
    for_each(
        lambda offset: read_scattered(
            address, start + offset, [target[offset : offset + PART_BYTES]]
        ),
        parts,
    )


def read_scattered(address: str, start: int, targets: Sequence[memoryview]) -> None:
    """Fill several buffers, one after the other, from byte `start` of an object of S3 on.

    By one request. StorageError if the object ends before all are full.
    """
    bucket, key = split_s3(address)
    end = start + sum(len(each) for each in targets) - 1
    for attempt in range(1, TRIES + 1):
        try:
            with explaining(bucket, key):
                reply = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end}")
                _receive(reply, targets, address)
            return
        except UnreachableError:
            # botocore tries again until the headers are there; the rest is ours.
            if attempt == TRIES:
                raise


@contextmanager
def open_read(address: str, buffer_bytes: int) -> Iterator[IO[bytes]]:
    with io.BufferedReader(_S3File(address, size(address)), buffer_size=buffer_bytes) as buffer:
        yield buffer


def write_bytes(address: str, content: bytes, *, if_absent: bool) -> None:
    bucket, key = split_s3(address)
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
    with explaining(bucket, key):
        client().put_object(Bucket=bucket, Key=key, Body=content, **condition)


@contextmanager
def open_write(address: str, expected_size: int | None) -> Iterator[IO[bytes]]:
    part_bytes = max(WRITE_PART_BYTES, -(-(expected_size or 0) // MAX_PARTS))
    upload = MultipartUpload(address, part_bytes)
    try:
        yield upload  # type: ignore[misc]  # it has write(), which is all that is promised
    except BaseException:
        upload.abort()
        raise
    upload.finish()


def download(address: str, path: Path) -> None:
    bucket, key = split_s3(address)
    with explaining(bucket, key):
        client().download_file(bucket, key, str(path), Config=_TRANSFER)


def upload(path: Path, address: str) -> None:
    bucket, key = split_s3(address)
    with local.open_read(str(path)):
        pass  # a missing file is the caller's, and no matter of S3
    with explaining(bucket, key):
        client().upload_file(str(path), bucket, key, Config=_TRANSFER)


def delete(address: str) -> None:
    bucket, key = split_s3(address)
    with explaining(bucket, key):
        client().delete_object(Bucket=bucket, Key=key)


def delete_folder(address: str) -> None:
    bucket, key = split_s3(address)
    if not key:
        raise ValueError(f"refusing to empty the whole bucket {bucket}")
    keys = [file.address.removeprefix(f"s3://{bucket}/") for file in list_files(address)]
    for start in range(0, len(keys), 1000):  # S3's limit for a request
        with explaining(bucket, key):
            reply = client().delete_objects(
                Bucket=bucket,
                Delete={"Objects": [{"Key": k} for k in keys[start : start + 1000]], "Quiet": True},
            )
        for error in reply.get("Errors", []):
            raise StorageError(f"cannot delete s3://{bucket}/{error['Key']}: {error['Message']}")


class _S3File(io.RawIOBase):
    """A file of S3 that reads by ranges."""

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

    Straight from the socket, by the http.client below urllib3 below botocore: what they read they
    copy, and hold the interpreter's lock meanwhile, at which parallel requests would queue.
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
                    count = response._fp.readinto(target[filled:])
                    if not count:
                        raise _broken(address, received, size, "the server closed it")
                    filled += count
                    received += count
            response.read(1)  # nothing is left, and the connection can be used again
        except StorageError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _broken(address, received, size, repr(error)) from error


def _broken(address: str, received: int, size: int, reason: str) -> UnreachableError:
    return UnreachableError(
        f"{address}: the connection to {endpoint()} broke after {received} of {size} bytes "
        f"({reason}); remedy: check the network"
    )
