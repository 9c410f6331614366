"""Multipart uploads to S3, of a stream or of a local file."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from s3transfer.utils import ReadFileChunk

from gptj.storage.addresses import split_s3
from gptj.storage.errors import AlreadyExistsError, NotFoundError, StorageError
from gptj.storage.parallel import PARALLEL, for_each
from gptj.storage.s3_client import client, explaining, was_retried

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef as Part

WRITE_PART_BYTES = 8 * 2**20  # of a streaming upload; several parts are in memory
MAX_PARTS = 10_000  # S3's limit

logger = logging.getLogger(__name__)


# After a retry: an earlier try succeeded, or another writer did.
_PERHAPS_DONE = ("NoSuchUpload", "PreconditionFailed", "412")


def condition(if_absent: bool) -> dict[str, Any]:
    """The arguments of a request that writes."""
    return {"IfNoneMatch": "*"} if if_absent else {}


def put_once(address: str, content: bytes, *, if_absent: bool) -> None:
    """Write an object in one request; a try that succeeded unseen counts as ours."""
    bucket, key = split_s3(address)
    try:
        with explaining(bucket, key):
            client().put_object(Bucket=bucket, Key=key, Body=content, **condition(if_absent))
    except AlreadyExistsError as error:
        if not was_retried(error.__cause__, *_PERHAPS_DONE) or not _has_content(
            bucket, key, content
        ):
            raise


def _has_content(bucket: str, key: str, content: bytes) -> bool:
    with explaining(bucket, key):
        found = client().get_object(Bucket=bucket, Key=key)
        return found["ContentLength"] == len(content) and found["Body"].read() == content


class MultipartUpload:
    """A multipart upload in progress: parts in any order, then `complete` or `abort`."""

    def __init__(self, address: str, *, if_absent: bool = False) -> None:
        self._address = address
        self._condition = condition(if_absent)
        self._bucket, self._key = split_s3(address)
        self._lock = Lock()
        self._size = 0  # bytes sent
        with explaining(self._bucket, self._key):
            self._upload_id = client().create_multipart_upload(
                Bucket=self._bucket, Key=self._key, ChecksumAlgorithm="CRC32"
            )["UploadId"]

    def send(self, number: int, body: Any) -> Part:
        """Send a part of at least 5 MiB, unless it is the last; numbers start at 1."""
        with explaining(self._bucket, self._key):
            reply = client().upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=body,
                ChecksumAlgorithm="CRC32",
            )
        sent: Part = {"ETag": reply["ETag"], "PartNumber": number}
        with self._lock:
            self._size += len(body)
        if "ChecksumCRC32" in reply:
            sent["ChecksumCRC32"] = reply["ChecksumCRC32"]
        return sent

    def complete(self, parts: Iterable[Part]) -> None:
        parts = list(parts)
        try:
            with explaining(self._bucket, self._key):
                client().complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": parts},
                    **self._condition,
                )
        except StorageError as error:
            if not was_retried(error.__cause__, *_PERHAPS_DONE) or not self._is_there(parts):
                raise

    def _is_there(self, parts: Sequence[Part]) -> bool:
        """Whether the object consists of exactly these parts."""
        try:
            with explaining(self._bucket, self._key):
                found = client().head_object(Bucket=self._bucket, Key=self._key)
        except NotFoundError:
            return False
        digests = [part["ETag"].strip('"') for part in parts]
        etag = f"-{len(parts)}"
        if all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests):  # not if encrypted
            etag = hashlib.md5(bytes.fromhex("".join(digests))).hexdigest() + etag
        return found["ContentLength"] == self._size and found["ETag"].strip('"').endswith(etag)

    def abort(self) -> None:
        """Discard the parts, which the server would keep, and bill.

        Only warns if that fails: the error that led here matters more.
        """
        try:
            with explaining(self._bucket, self._key):
                client().abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=self._upload_id
                )
        except StorageError as error:
            logger.warning("cannot abort an unfinished upload: %s", error)


def upload_file(path: Path, address: str, size: int, part_bytes: int) -> None:
    """Upload a large local file, reading each part as it is sent."""
    part_bytes = max(part_bytes, -(-size // MAX_PARTS))
    upload = MultipartUpload(address)
    starts = range(0, size, part_bytes)
    sent: dict[int, Part] = {}

    def send(number: int) -> None:
        with ReadFileChunk.from_filename(str(path), starts[number - 1], part_bytes) as body:
            sent[number] = upload.send(number, body)

    try:
        for_each(send, range(1, len(starts) + 1))
        upload.complete(sent[number] for number in sorted(sent))
    except BaseException:
        upload.abort()
        raise


class StreamingUpload:
    """A sequential writer whose parts are uploaded by background threads."""

    def __init__(self, address: str, part_bytes: int, *, if_absent: bool = False) -> None:
        self._address, self._if_absent = address, if_absent
        self._part_bytes = part_bytes
        self._buffer = bytearray()
        self._upload: MultipartUpload | None = None
        self._parts: list[Future[Part]] = []
        self._pool = ThreadPoolExecutor(PARALLEL // 4)

    def write(self, content: bytes | bytearray | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), self._part_bytes):
            self._buffer += view[start : start + self._part_bytes]
            while len(self._buffer) >= self._part_bytes:
                with memoryview(self._buffer) as filled:
                    part = bytes(filled[: self._part_bytes])
                self._send(part)
                del self._buffer[: self._part_bytes]
        return len(view)

    def finish(self) -> None:
        try:
            if self._upload is None:  # it fits in one request
                put_once(self._address, bytes(self._buffer), if_absent=self._if_absent)
                return
            if self._buffer:
                self._send(bytes(self._buffer))
            self._upload.complete([future.result() for future in self._parts])
        except BaseException:
            self.abort()
            raise
        finally:
            self._pool.shutdown()

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._upload is not None:
            self._upload.abort()
            self._upload = None

    def _send(self, part: bytes) -> None:
        if self._upload is None:
            self._upload = MultipartUpload(self._address, if_absent=self._if_absent)
        waiting = [future for future in self._parts if not future.done()]
        if len(waiting) >= PARALLEL // 4:  # bound the memory
            wait(waiting, return_when=FIRST_COMPLETED)
        for future in self._parts:
            if future.done():
                future.result()  # fail now if a part has failed
        self._parts.append(self._pool.submit(self._upload.send, len(self._parts) + 1, part))
