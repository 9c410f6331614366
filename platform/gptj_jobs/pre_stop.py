"""The preStop hook of a training's head pod: the trainings whose drivers run in it save and stop.

    python -m gptj_jobs.pre_stop

A pod's SIGTERM reaches its first process only, not a job's driver. Unlike after `ray job stop`, the
job has failed, so that a RayJob resumes it on a new cluster. It waits for the drivers to end, and
Kubernetes ends it with the pod's grace period.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROGRAM = "jobs/finetune.py"


def main() -> None:
    for driver in list(_drivers()):
        select.select([driver], [], [])  # until it has ended


def _drivers() -> Iterator[int]:
    """A descriptor of each driver, to which SIGTERM has been sent."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            descriptor = os.pidfd_open(int(folder.name))
            if _runs_program((folder / "cmdline").read_bytes()):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                yield descriptor
            else:
                os.close(descriptor)


def _runs_program(command: bytes) -> bool:
    """Whether it is Python with our program, rather than a shell that has it in its command."""
    words = os.fsdecode(command).split("\0")
    return Path(words[0]).name.startswith("python") and any(
        word == PROGRAM or word.endswith(f"/{PROGRAM}") for word in words[1:]
    )


if __name__ == "__main__":
    main()
