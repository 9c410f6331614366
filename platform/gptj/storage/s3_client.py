"""boto3's client for the environment as it is, and its errors as ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from gptj.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from gptj.storage.parallel import PARALLEL

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 5
READ_SECONDS = 60  # without a byte from the server
TRIES = 4  # of one request, with growing pauses
DEFAULT_REGION = "us-east-1"
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


def client() -> S3Client:
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


@contextmanager
def explaining(bucket: str, key: str) -> Iterator[None]:
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
            f"{place}: no answer from {endpoint()} ({error}); remedy: check the network and "
            f"AWS_ENDPOINT_URL"
        ) from error
    except BotoCoreError as error:
        raise StorageError(f"{place}: {error}") from error


def _explained(error: ClientError, bucket: str, key: str) -> StorageError:
    place = f"s3://{bucket}/{key}"
    code = error.response.get("Error", {}).get("Code", "")
    message = error.response.get("Error", {}).get("Message", "")
    if code == "NoSuchBucket" or (code == "404" and not bucket_exists(bucket)):
        return no_bucket(bucket, key)
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{place} is not there: bucket {bucket!r} has no key {key!r}")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExistsError(f"{place} exists already")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return AccessDeniedError(
            f"{place}: {endpoint()} does not accept the credentials ({code}); remedy: check "
            f"AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if code in ("AccessDenied", "403", "Forbidden"):
        return AccessDeniedError(
            f"{place}: access denied by {endpoint()}; remedy: let these credentials read, list "
            f"and write bucket {bucket!r}, key {key!r}, or use others (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY)"
        )
    if code in ("InvalidRange", "416"):
        return StorageError(f"{place} is shorter than it should be: it is cut off")
    return StorageError(f"{place}: {code} {message}".rstrip())


def no_bucket(bucket: str, key: str) -> NotFoundError:
    return NotFoundError(
        f"s3://{bucket}/{key}: there is no bucket {bucket!r} at {endpoint()}; remedy: create it, "
        f"or correct the address or AWS_ENDPOINT_URL"
    )


def bucket_exists(bucket: str) -> bool:
    """A HEAD of a missing key does not say whether it is the bucket that is missing."""
    try:
        client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response.get("Error", {}).get("Code") != "404"
    return True


def endpoint() -> str:
    return client().meta.endpoint_url
