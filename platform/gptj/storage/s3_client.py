"""A boto3 client for the current environment, with its errors translated to ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)

from gptj.storage.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from gptj.storage.parallel import PARALLEL
from gptj.storage.retries import Retries

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_SECONDS = 5
READ_SECONDS = 60  # without a byte from the server
OTHER_SERVER = (
    "remedy: a server with conditional writes, such as AWS S3, or a newer release of this one"
)

_OUT_OF_RANGE = ("InvalidRange", "416")


def client() -> S3Client:
    """The boto3 client for the current environment; cached, since creating one is slow."""
    return _current()[0]


def retry_policy() -> Retries:
    """Decides whether the client's requests are retried."""
    return _current()[1]


def _current() -> tuple[S3Client, Retries]:
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))
    return _client_for(os.getpid(), tuple(variables))


@lru_cache(maxsize=4)
def _client_for(
    process_id: int, variables: tuple[tuple[str, str], ...]
) -> tuple[S3Client, Retries]:
    # Not boto3's default session, which is not thread-safe.
    try:
        client = boto3.Session().client(
            "s3",
            region_name=os.environ.get("AWS_REGION") or None,
            config=Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"total_max_attempts": 1, "mode": "standard"},  # we have our own
                max_pool_connections=4 * PARALLEL,
                signature_version="s3v4",
            ),
        )
    except ValueError as error:  # the endpoint is not a URL
        raise StorageError(f"{error}; remedy: correct AWS_ENDPOINT_URL") from error
    retries = Retries(client.meta.endpoint_url)
    client.meta.events.register("needs-retry.s3", retries.needs_retry)  # type: ignore[arg-type]
    client.meta.events.register("request-created.s3", retries.check_fence)
    retries.clock.register(client.meta.events)
    return client, retries


@contextmanager
def explaining(bucket: str, key: str) -> Iterator[None]:
    """Translate boto3's errors into ours, with bucket, key and remedy."""
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
    except Boto3Error as error:  # transfers wrap the cause
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ClientError):
            raise _explained(cause, bucket, key) from error
        kind = UnreachableError if isinstance(error, RetriesExceededError) else StorageError
        raise kind(f"{place}: {error}") from error
    except SSLError as error:
        raise UnreachableError(
            f"{place}: no secure connection to {endpoint()} ({error}); remedy: set AWS_CA_BUNDLE "
            f"to a file with the certificate of the server's CA; it is now "
            f"{os.environ.get('AWS_CA_BUNDLE')!r}"
        ) from error
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
    if code == "404":
        with explaining(bucket, key):
            code = "NoSuchKey" if bucket_exists(bucket) else "NoSuchBucket"
    if code == "NoSuchBucket":
        return no_bucket(bucket, key)
    if code == "NoSuchKey":
        return NotFoundError(f"{place} does not exist: bucket {bucket!r} has no key {key!r}")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExistsError(f"{place} already exists")
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
    if code in ("NotImplemented", "501"):
        return StorageError(
            f"{place}: {endpoint()} lacks a request that we need, such as a conditional write with "
            f"If-None-Match ({message or code}); {OTHER_SERVER}"
        )
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed"):
        return StorageError(
            f"{place}: bucket {bucket!r} is in another region ({message or code}); remedy: set "
            f"AWS_REGION to the bucket's, and AWS_ENDPOINT_URL only for servers other than AWS"
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"{place}: the clocks of this machine and of {endpoint()} differ by too much; remedy: "
            f"set them, for example with NTP"
        )
    if code in _OUT_OF_RANGE:
        return StorageError(f"{place} is truncated: it is shorter than it should be")
    return StorageError(f"{place}: {code} {message}".rstrip())


def is_out_of_range(error: BaseException | None) -> bool:
    """Whether the requested range lies beyond the end of the file."""
    return (
        isinstance(error, ClientError)
        and error.response.get("Error", {}).get("Code", "") in _OUT_OF_RANGE
    )


def no_bucket(bucket: str, key: str) -> NotFoundError:
    return NotFoundError(
        f"s3://{bucket}/{key}: there is no bucket {bucket!r} at {endpoint()}; remedy: create it, "
        f"or correct the address or AWS_ENDPOINT_URL"
    )


def was_retried(error: BaseException | None, *codes: str) -> bool:
    """Whether a request failed with one of these codes after a retry.

    Then an earlier attempt may have succeeded, and only its reply was lost.
    """
    if not isinstance(error, ClientError):
        return False
    found = error.response.get("Error", {}).get("Code", "")
    return found in codes and error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0


def bucket_exists(bucket: str) -> bool:
    """Whether the bucket exists; a HEAD of a missing key does not tell."""
    try:
        client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response.get("Error", {}).get("Code") != "404"
    return True


def endpoint() -> str:
    return client().meta.endpoint_url
