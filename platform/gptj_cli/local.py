"""S3 and Ray on this machine's loopback, which outlive the command that starts them.

`up` starts a supervisor process (gptj_cli.supervisor), which records its processes in a folder;
`down` ends exactly the processes recorded there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gptj.environment.processes import identity
from gptj.storage.file_lock import FileLock
from gptj_local.exports import write_exports
from gptj_local.processes import tail
from gptj_local.ray import SESSIONS

START_SECONDS = 240
END_SECONDS = 120
STATE, EXPORTS, LOG = "up.json", "env", "up.log"
LOCK = "lock"  # held by the supervisor while it runs


@dataclass(frozen=True)
class Process:
    """A process, identified by id and start, since ids are reused."""

    number: int
    created: float  # start time, in seconds since 1970; it moves with the system's clock
    # None: in a state file of an earlier version, or on a system without /proc.
    identity: str | None = None

    @classmethod
    def of(cls, number: int) -> Process:
        return cls(number, psutil.Process(number).create_time(), identity(number))

    def running(self) -> psutil.Process | None:
        """None once it has ended."""
        try:
            process = psutil.Process(self.number)
            if self.identity is not None:
                same = identity(self.number) == self.identity
            else:
                same = abs(process.create_time() - self.created) < 0.01
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class Local:
    """The running services."""

    supervisor: Process
    parts: dict[str, Process]
    s3: str  # the endpoint
    dashboard: str
    variables: dict[str, str]  # for programs that use it
    sessions: str = ""  # the folder of Ray's files; unknown in state files of earlier versions

    def write(self, folder: Path) -> None:
        """Write the exports, then the state file, so that readers of the latter find both."""
        write_exports(folder / EXPORTS, self.variables)
        state = asdict(self)
        del state["variables"]  # they hold secrets, which belong in one place
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
    """Start S3 and Ray, unless they are running; returns whether this call started them.

    Raises RuntimeError with the end of the log if they do not come up.
    """
    if is_up(folder):
        return False
    if read(folder) is not None:  # a killed supervisor has left processes behind
        down(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gptj_cli.supervisor", str(folder), str(cpus)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # survives Ctrl-C and the end of this terminal
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while read(folder) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"S3 and Ray did not start; the end of {log}:\n{tail(log)}")
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait(END_SECONDS)
        raise
    return True


def down(folder: Path) -> bool:
    """End what `up` started, and nothing else; returns whether there was anything.

    Raises RuntimeError if a supervisor runs that the state file does not describe, which then
    stays.
    """
    state = read(folder)
    supervisor = None if state is None else Process(**state["supervisor"]).running()
    if supervisor is None and _is_held(folder):
        number = f" (perhaps process {state['supervisor']['number']})" if state is not None else ""
        raise RuntimeError(
            f"a process of gptj up holds {folder / LOCK}, but {folder / STATE} does not describe "
            f"it: nothing is stopped; remedy: wait until it has started or ended, or find "
            f"`gptj_cli.supervisor {folder}` with ps{number}, and end it with kill"
        )
    if state is None:
        return False
    if supervisor is not None:
        supervisor.terminate()
        try:
            supervisor.wait(END_SECONDS)
        except psutil.TimeoutExpired:
            supervisor.kill()
    # Only a killed supervisor leaves any.
    left = [Process(**part).running() for part in state["parts"].values()]
    trees = [each for part in left if part for each in (part, *part.children(recursive=True))]
    for process in trees:
        if process.is_running():
            process.kill()
    psutil.wait_procs(trees, timeout=10)
    sessions = Path(state.get("sessions", ""))
    if sessions.name.startswith(SESSIONS):
        shutil.rmtree(sessions, ignore_errors=True)
    Local.forget(folder)
    return supervisor is not None or bool(trees)


def _is_held(folder: Path) -> bool:
    """Whether a supervisor runs there."""
    if not (folder / LOCK).exists():
        return False
    with FileLock(folder / LOCK) as lock:
        return not lock.try_take()


def default_cpus() -> int:
    """Logical CPUs of the Ray node: enough for two workers and a replica on a small machine."""
    return max(4, os.cpu_count() or 1)
