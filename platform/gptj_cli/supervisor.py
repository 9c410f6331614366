"""The process behind `gptj up`: runs S3 and Ray, and stops them when signalled.

python -m gptj_cli.supervisor FOLDER CPUS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from gptj.storage.file_lock import FileLock
from gptj_cli.local import LOCK, Local, Process
from gptj_local.exports import shield
from gptj_local.ray import CLUSTER_VARIABLE, LocalRay
from gptj_local.s3 import LocalS3

WATCH_SECONDS = 1.0

# Variables from another cluster's exports, sourced in this terminal; they must not reach our jobs.
OF_ANOTHER_CLUSTER = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_MODE",
    CLUSTER_VARIABLE,
)


def main() -> None:
    folder, cpus = Path(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    for name in OF_ANOTHER_CLUSTER:
        os.environ.pop(name, None)
    shield(os.environ)
    supervise(folder, cpus)


def supervise(folder: Path, cpus: int) -> None:
    """Run both until a signal; RuntimeError if one of them exits by itself."""
    lock = FileLock(folder / LOCK)
    if not lock.try_take():
        sys.exit(f"another `gptj up` is running in {folder}")
    with LocalS3.start(folder / "s3") as s3:
        variables = s3.environment() | {"GPTJ_STORAGE": f"s3://{s3.bucket}"}
        with LocalRay.start(folder, cpus=cpus, environment=os.environ | variables) as ray:
            parts = {"S3": s3.process_id, "Ray": ray.process_id}
            local = Local(
                supervisor=Process.of(os.getpid()),
                parts={name: Process.of(number) for name, number in parts.items()},
                s3=s3.endpoint,
                dashboard=ray.dashboard,
                variables=variables | ray.environment(),
                sessions=str(ray.sessions),
            )
            try:
                local.write(folder)
                while True:
                    time.sleep(WATCH_SECONDS)
                    for name, number in parts.items():
                        if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                            raise RuntimeError(f"{name} exited by itself: see the logs")
            finally:
                Local.forget(folder)


def _end(number: int, frame: FrameType | None) -> None:
    # Only once: a second signal must not interrupt the clean-up.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
