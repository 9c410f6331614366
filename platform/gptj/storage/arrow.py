"""pyarrow's file system for an address."""

from __future__ import annotations

import os
from typing import Any

import boto3
import pyarrow.fs

from gptj.addresses import absolute, is_s3, split_s3
from gptj.storage.s3_client import CONNECT_SECONDS, DEFAULT_REGION, READ_SECONDS, TRIES


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
        region=session.region_name or os.environ.get("AWS_REGION") or DEFAULT_REGION,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        **arguments,
    )
    return filesystem, f"{bucket}/{key}".rstrip("/")
