"""One way to read and write local paths and `s3://bucket/key` addresses: bytes in, bytes out.

Addresses are those of gptj.addresses. S3 goes through boto3, which reads the usual AWS variables
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, a profile, an instance's
role). Every request has a time limit and a bounded number of tries, and carries a checksum that the
server verifies. What is written appears as a whole or not at all, on both kinds of storage.
"""

from __future__ import annotations

import http.client
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from gptj.addresses import absolute, local_path
from gptj.addresses import is_s3 as is_s3
from gptj.addresses import join as join
from gptj.addresses import split_s3 as split_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

CONNECT_SECONDS = 5
READ_SECONDS = 60  # without a byte from the server
TRIES = 4  # of one request, with growing pauses
PARALLEL = 16  # requests at a time
PART_BYTES = 16 * 2**20  # of a multipart transfer
WRITE_PART_BYTES = 8 * 2**20  # of a file that is written piece by piece: some are in memory
MAX_PARTS = 10_000  # S3's limit

Item = TypeVar("Item")
Result = TypeVar("Result")


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


@dataclass(frozen=True)
class FileInfo:
    address: str
    name: str  # relative to the folder that was listed, with /
    size: int  # bytes


def exists(address: str) -> bool:
    """Whether there is a file at the address."""
    if not is_s3(address):
        return local_path(address).is_file()
    try:
        size(address)
    except NotFoundError:
        return False
    return True


def size(address: str) -> int:
    """Bytes of a file; NotFoundError if it is not there."""
    if not is_s3(address):
        with _explaining_local(address):
            return local_path(address).stat().st_size
    bucket, key = split_s3(address)
    with _explaining(bucket, key):
        return _client().head_object(Bucket=bucket, Key=key)["ContentLength"]


def list_files(folder: str) -> list[FileInfo]:
    """All files below a folder, by name; an empty list if there is none.

    NotFoundError if its bucket does not exist. Files that are still being written are not listed.
    """
    if not is_s3(folder):
        root = local_path(folder)
        paths = (path for path in root.rglob("*") if path.is_file())
        files = [
            FileInfo(str(path), path.relative_to(root).as_posix(), path.stat().st_size)
            for path in paths
            if not path.name.endswith(_UNFINISHED)
        ]
        return sorted(files, key=lambda file: file.name)
    bucket, key = split_s3(folder)
    prefix = f"{key}/" if key else ""
    files = []
    with _explaining(bucket, key):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):  # some servers list folders too
                    files.append(FileInfo(f"s3://{bucket}/{item['Key']}", name, item["Size"]))
    return sorted(files, key=lambda file: file.name)


def read_bytes(address: str, start: int = 0, length: int | None = None) -> bytes:
    """A file, or `length` bytes of it from `start` on.

    NotFoundError if there is no such file, StorageError if it ends before `start + length`.
    """
    if length is None:
        length = size(address) - start
    content = bytearray(length)
    read_into(address, start, memoryview(content))
    return bytes(content)


def read_into(address: str, start: int, target: memoryview) -> None:
    """Fill `target` from byte `start` of a file on, large ones by parallel requests.

    StorageError if the file ends before `target` is full.
    """
    if not is_s3(address):
        with _explaining_local(address), io.FileIO(local_path(address)) as file:
            file.seek(start)
            _fill(file, target, address)
        return
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
            with _explaining(bucket, key):
                reply = _client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end}")
                _receive(reply, targets, address)
            return
        except UnreachableError:
            # botocore tries again until the headers are there; the rest is ours.
            if attempt == TRIES:
                raise


@contextmanager
def open_read(address: str, *, buffer_bytes: int = PART_BYTES // 4) -> Iterator[IO[bytes]]:
    """A file to read from and to seek in; from S3 it comes in pieces, as they are asked for.

    `buffer_bytes` is the smallest piece: small ones are for reading here and there.
    """
    if not is_s3(address):
        with _explaining_local(address), local_path(address).open("rb") as file:
            yield file
        return
    with io.BufferedReader(_S3File(address, size(address)), buffer_size=buffer_bytes) as buffer:
        yield buffer


def write_bytes(address: str, content: bytes, *, if_absent: bool = False) -> None:
    """Write a whole file; `if_absent` raises AlreadyExistsError if there is one already."""
    if not is_s3(address):
        with _writing_local(address, if_absent) as file:
            file.write(content)
        return
    bucket, key = split_s3(address)
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
    with _explaining(bucket, key):
        _client().put_object(Bucket=bucket, Key=key, Body=content, **condition)


@contextmanager
def open_write(address: str, *, expected_size: int | None = None) -> Iterator[IO[bytes]]:
    """A file to write to from front to back; it appears when the block has ended well.

    To S3 it goes in parts while it is written, so that memory holds some parts and no disk is
    needed. `expected_size` (bytes) makes parts large enough for a file of more than 80 GB.
    """
    if not is_s3(address):
        with _writing_local(address, if_absent=False) as file:
            yield file
        return
    part_bytes = max(WRITE_PART_BYTES, -(-(expected_size or 0) // MAX_PARTS))
    upload = _MultipartUpload(address, part_bytes)
    try:
        yield upload  # type: ignore[misc]  # it has write(), which is all that is promised
    except BaseException:
        upload.abort()
        raise
    upload.finish()


def download(address: str, path: str | Path) -> None:
    """Copy a file to a local path, in parallel parts; the path's folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not is_s3(address):
        with _explaining_local(address), local_path(address).open("rb") as source:
            with _writing_local(str(path), if_absent=False) as target:
                shutil.copyfileobj(source, target, PART_BYTES)
        return
    bucket, key = split_s3(address)
    with _explaining(bucket, key):
        _client().download_file(bucket, key, str(path), Config=_TRANSFER)


def upload(path: str | Path, address: str) -> None:
    """Copy a local file to an address, in parallel parts."""
    if not is_s3(address):
        download(str(path), address)
        return
    bucket, key = split_s3(address)
    with _explaining_local(str(path)), open(path, "rb"):
        pass  # a missing file is the caller's, and no matter of S3
    with _explaining(bucket, key):
        _client().upload_file(str(path), bucket, key, Config=_TRANSFER)


def download_folder(
    address: str, path: str | Path, names: Iterable[str] | None = None
) -> list[FileInfo]:
    """Copy a folder's files (those of the given relative names) to a local folder."""
    wanted = None if names is None else set(names)
    files = [file for file in list_files(address) if wanted is None or file.name in wanted]
    if wanted is not None and (missing := wanted - {file.name for file in files}):
        raise NotFoundError(f"{address} has no {', '.join(sorted(missing))}")
    for_each(lambda file: download(file.address, Path(path, file.name)), files)
    return files


def upload_folder(path: str | Path, address: str) -> list[FileInfo]:
    """Copy a local folder's files to an address."""
    files = list_files(str(path))
    for_each(lambda file: upload(file.address, join(address, file.name)), files)
    return files


def delete(address: str) -> None:
    """Delete a file; nothing happens if it is not there."""
    if not is_s3(address):
        with _explaining_local(address):
            local_path(address).unlink(missing_ok=True)
        return
    bucket, key = split_s3(address)
    with _explaining(bucket, key):
        _client().delete_object(Bucket=bucket, Key=key)


def delete_folder(address: str) -> None:
    """Delete all files below an address; nothing happens if there are none."""
    if not is_s3(address):
        if local_path(address).exists():
            with _explaining_local(address):
                shutil.rmtree(local_path(address))
        return
    bucket, key = split_s3(address)
    if not key:
        raise ValueError(f"refusing to empty the whole bucket {bucket}")
    keys = [file.address.removeprefix(f"s3://{bucket}/") for file in list_files(address)]
    for start in range(0, len(keys), 1000):  # S3's limit for a request
        with _explaining(bucket, key):
            reply = _client().delete_objects(
                Bucket=bucket,
                Delete={"Objects": [{"Key": k} for k in keys[start : start + 1000]], "Quiet": True},
            )
        for error in reply.get("Errors", []):
            raise StorageError(f"cannot delete s3://{bucket}/{error['Key']}: {error['Message']}")


def check_writable(address: str) -> None:
    """Write a small file below the address and delete it; raise StorageError if that fails.

    For the start of long work, so that a missing bucket does not show at its end.
    """
    probe = join(address, f".writable-{secrets.token_hex(8)}")
    if is_s3(address):
        bucket, key = split_s3(probe)
        with _explaining(bucket, key):
            if not _bucket_exists(bucket):  # some servers make it when a file is written
                raise _no_bucket(bucket, key)
    write_bytes(probe, b"")
    delete(probe)


def arrow_filesystem(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow's file system for an address and the path in it, for Ray Train and Parquet.

    It uses the same server and credentials, with the same limits of time and tries.
    """
    if not is_s3(address):
        return pyarrow.fs.LocalFileSystem(), absolute(address)
    bucket, key = split_s3(address)
    session = boto3.Session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, host = (endpoint or "").rpartition("://")
    credentials = session.get_credentials()
    arguments: dict[str, Any] = {}
    if credentials is not None and credentials.method in ("env", "shared-credentials-file"):
        # The others expire; Arrow finds and renews those by itself.
        found = credentials.get_frozen_credentials()
        arguments = {"access_key": found.access_key, "secret_key": found.secret_key}
        if found.token:
            arguments["session_token"] = found.token
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=session.region_name or os.environ.get("AWS_REGION") or _DEFAULT_REGION,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        **arguments,
    )
    return filesystem, f"{bucket}/{key}".rstrip("/")


def for_each(action: Callable[[Item], Any], items: Iterable[Item], at_once: int = PARALLEL) -> None:
    """Call `action` on every item, some at a time; the first error stops it and is raised."""
    work = list(items)
    if len(work) == 1:
        action(work[0])
    elif work:
        with ThreadPoolExecutor(min(at_once, len(work))) as pool:
            futures = [pool.submit(action, item) for item in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise


_DEFAULT_REGION = "us-east-1"
_UNFINISHED = ".unfinished"
_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL
)


class _MultipartUpload:
    """Bytes written one after the other, sent in parts by threads while more are written."""

    def __init__(self, address: str, part_bytes: int) -> None:
        self._address = address
        self._bucket, self._key = split_s3(address)
        self._part_bytes = part_bytes
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[Future[dict[str, Any]]] = []
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
            with _explaining(self._bucket, self._key):
                if self._upload_id is None:  # it fits one request
                    _client().put_object(
                        Bucket=self._bucket, Key=self._key, Body=bytes(self._buffer)
                    )
                    return
                if self._buffer:
                    self._send(bytes(self._buffer))
                parts = [future.result() for future in self._parts]
                _client().complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                )
        except BaseException:
            self.abort()
            raise
        finally:
            self._pool.shutdown()

    def abort(self) -> None:
        """Forget what was sent: the server would keep, and bill, the parts."""
        self._pool.shutdown(cancel_futures=True)
        if self._upload_id is not None:
            upload_id, self._upload_id = self._upload_id, None
            with _explaining(self._bucket, self._key):
                _client().abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=upload_id
                )

    def _send(self, part: bytes) -> None:
        if self._upload_id is None:
            with _explaining(self._bucket, self._key):
                self._upload_id = _client().create_multipart_upload(
                    Bucket=self._bucket, Key=self._key, ChecksumAlgorithm="CRC32"
                )["UploadId"]
        waiting = [future for future in self._parts if not future.done()]
        if len(waiting) >= PARALLEL // 4:  # bound the memory
            wait(waiting, return_when=FIRST_COMPLETED)
        for future in self._parts:
            if future.done():
                future.result()  # a part that failed ends the upload now
        self._parts.append(self._pool.submit(self._send_part, len(self._parts) + 1, part))

    def _send_part(self, number: int, part: bytes) -> dict[str, Any]:
        with _explaining(self._bucket, self._key):
            reply = _client().upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload_id or "",
                PartNumber=number,
                Body=part,
                ChecksumAlgorithm="CRC32",
            )
        sent: dict[str, Any] = {"ETag": reply["ETag"], "PartNumber": number}
        if "ChecksumCRC32" in reply:
            sent["ChecksumCRC32"] = reply["ChecksumCRC32"]
        return sent


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
        raise _ends_early(address, size - length)
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
        f"{address}: the connection to {_endpoint()} broke after {received} of {size} bytes "
        f"({reason}); remedy: check the network"
    )


def _ends_early(address: str, missing: int) -> StorageError:
    return StorageError(f"{address} ends {missing} bytes before it should: it is cut off")


def _fill(file: io.FileIO, target: memoryview, address: str) -> None:
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled:])
        if not count:
            raise _ends_early(address, len(target) - filled)
        filled += count


@contextmanager
def _writing_local(address: str, if_absent: bool) -> Iterator[IO[bytes]]:
    """A file beside the path, synced and moved there at the end."""
    path = local_path(address)
    with _explaining_local(address):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        try:
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                os.link(unfinished, path)  # unlike a rename, this refuses an existing file
            else:
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explaining_local(address: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileExistsError as error:
        raise AlreadyExistsError(f"{address} exists already") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{address} is not there") from error
    except PermissionError as error:
        raise AccessDeniedError(
            f"{address}: {error.strerror}; remedy: check who owns it, and its mode"
        ) from error
    except OSError as error:
        raise StorageError(f"{address}: {error.strerror or error}") from error


@contextmanager
def _explaining(bucket: str, key: str) -> Iterator[None]:
    """boto3's errors as ours, with bucket, key and remedy."""
    place = f"s3://{bucket}/{key}"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDeniedError(
            f"{place}: there are no credentials for bucket {bucket!r}; remedy: set "
            f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except ClientError as error:
        raise _explained(error, bucket, key) from error
    except Boto3Error as error:  # its transfers wrap what went wrong
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ClientError):
            raise _explained(cause, bucket, key) from error
        raise StorageError(f"{place}: {error}") from error
    except (ConnectionError, HTTPClientError) as error:
        raise UnreachableError(
            f"{place}: no answer from {_endpoint()} ({error}); remedy: check the network and "
            f"AWS_ENDPOINT_URL"
        ) from error
    except BotoCoreError as error:
        raise StorageError(f"{place}: {error}") from error


def _explained(error: ClientError, bucket: str, key: str) -> StorageError:
    place = f"s3://{bucket}/{key}"
    code = error.response.get("Error", {}).get("Code", "")
    message = error.response.get("Error", {}).get("Message", "")
    if code == "NoSuchBucket" or (code == "404" and not _bucket_exists(bucket)):
        return _no_bucket(bucket, key)
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{place} is not there: bucket {bucket!r} has no key {key!r}")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExistsError(f"{place} exists already")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return AccessDeniedError(
            f"{place}: {_endpoint()} does not accept the credentials ({code}); remedy: check "
            f"AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if code in ("AccessDenied", "403", "Forbidden"):
        return AccessDeniedError(
            f"{place}: access denied by {_endpoint()}; remedy: let these credentials read, list "
            f"and write bucket {bucket!r}, key {key!r}, or use others (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY)"
        )
    if code in ("InvalidRange", "416"):
        return StorageError(f"{place} is shorter than it should be: it is cut off")
    return StorageError(f"{place}: {code} {message}".rstrip())


def _no_bucket(bucket: str, key: str) -> NotFoundError:
    return NotFoundError(
        f"s3://{bucket}/{key}: there is no bucket {bucket!r} at {_endpoint()}; remedy: create it, "
        f"or correct the address or AWS_ENDPOINT_URL"
    )


def _bucket_exists(bucket: str) -> bool:
    """A HEAD of a missing key does not say whether it is the bucket that is missing."""
    try:
        _client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response.get("Error", {}).get("Code") != "404"
    return True


def _endpoint() -> str:
    return _client().meta.endpoint_url


_AWS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def _client() -> S3Client:
    """boto3's client for the environment as it is now; making one takes a while."""
    return _client_for(os.getpid(), *(os.environ.get(name) for name in _AWS_VARIABLES))


@lru_cache(maxsize=4)
def _client_for(process_id: int, *variables: str | None) -> S3Client:
    # A session of our own, since boto3's default one is not safe to use from several threads.
    return boto3.Session().client(
        "s3",
        region_name=os.environ.get("AWS_REGION") or None,
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": TRIES, "mode": "standard"},
            max_pool_connections=4 * PARALLEL,
            signature_version="s3v4",
        ),
    )
