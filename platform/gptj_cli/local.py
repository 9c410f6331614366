"""S3 and Ray on this machine's loopback, which outlive the command that starts them.

`up` starts a supervisor process (gptj_cli.supervisor), which writes who it is into a folder; `down`
ends exactly the processes that are written there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gptj_local.exports import write_exports
from gptj_local.processes import tail

START_SECONDS = 240
END_SECONDS = 120
STATE, EXPORTS, LOG = "up.json", "env", "up.log"


@dataclass(frozen=True)
class Process:
    """A process that is meant even when its number has been given to another one since."""

    number: int
    created: float  # seconds since 1970, as the system counts them

    @classmethod
    def of(cls, number: int) -> Process:
        return cls(number, psutil.Process(number).create_time())

    def running(self) -> psutil.Process | None:
        """None once it has ended."""
        try:
            process = psutil.Process(self.number)
            same = abs(process.create_time() - self.created) < 0.01
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class Local:
    """What is up."""

    supervisor: Process
    parts: dict[str, Process]
    s3: str  # the endpoint
    dashboard: str
    variables: dict[str, str]  # for programs that use it

    def write(self, folder: Path) -> None:
        """The exports first: whoever finds the state file finds them too."""
        write_exports(folder / EXPORTS, self.variables)
        state = asdict(self)
        del state["variables"]  # they hold secrets, which lie in one place
        unfinished = folder / f"{STATE}.unfinished"
        unfinished.write_text(json.dumps(state, indent=2))
        unfinished.replace(folder / STATE)

    @staticmethod
    def forget(folder: Path) -> None:
        for name in (STATE, EXPORTS):
            (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The state file; None if there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        return None
    return state


def is_up(folder: Path) -> bool:
    state = read(folder)
    return state is not None and Process(**state["supervisor"]).running() is not None


def up(folder: Path, cpus: int) -> bool:
    """Start S3 and Ray, unless they run already; whether this call has started them.

    Raises RuntimeError with the end of the log if they do not come up.
    """
    if is_up(folder):
        return False
    if read(folder) is not None:  # a supervisor that was killed has left processes
        down(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gptj_cli.supervisor", str(folder), str(cpus)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C nor the end of this terminal reaches it
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while read(folder) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nothing is up; the end of {log}:\n{tail(log)}")
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait(END_SECONDS)
        raise
    return True


def down(folder: Path) -> bool:
    """End what `up` has started, by process id, and nothing else; whether there was anything."""
    state = read(folder)
    if state is None:
        return False
    supervisor = Process(**state["supervisor"]).running()
    if supervisor is not None:
        supervisor.terminate()
        try:
            supervisor.wait(END_SECONDS)
        except psutil.TimeoutExpired:
            supervisor.kill()
    # None is left unless the supervisor was killed.
    left = [Process(**part).running() for part in state["parts"].values()]
    trees = [each for part in left if part for each in (part, *part.children(recursive=True))]
    for process in trees:
        if process.is_running():
            process.kill()
    psutil.wait_procs(trees, timeout=10)
    Local.forget(folder)
    return supervisor is not None or bool(trees)


def default_cpus() -> int:
    """CPUs that Ray may promise: two workers and a replica fit on a small machine, too."""
    return max(4, os.cpu_count() or 1)
