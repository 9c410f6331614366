"""Subprocesses, each in its own session and ended together with its descendants."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Host:
    """Where programs run: on this machine and its loopback, or on one of gptj_local.hosts."""

    address: str = HOST
    prefix: tuple[str, ...] = ()  # of a command
    environment: Mapping[str, str] = field(default_factory=dict)  # what its programs need
    temporary: Path | None = None  # where it has files of its own; None: as usual

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs a command there."""
        return [*self.prefix, *words]


LOOPBACK = Host()


@contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, grace_seconds: float = 40
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` during the block, with its output in `log`.

    It gets its own session, so that Ctrl-C reaches only us and we can stop things in order: at the
    end of the block SIGTERM, `grace_seconds` to finish, then SIGKILL for it and every process that
    it left behind.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process, grace_seconds)


def end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL for what is left of its process tree after `grace_seconds`."""
    tree = _tree(process)
    process.terminate()
    try:
        process.wait(timeout=grace_seconds)
    except subprocess.TimeoutExpired:
        tree += _tree(process)
    finally:
        # In `finally`, since a second Ctrl-C may interrupt the wait.
        process.kill()
        process.wait()
        for orphan in tree:
            # psutil also compares start times, so a reused process id is never killed.
            if orphan.is_running():
                orphan.kill()
        psutil.wait_procs(tree, timeout=5)


def kill_tree(process: subprocess.Popen[bytes] | psutil.Process) -> None:
    """SIGKILL for it and all its descendants at once, as when a machine is lost."""
    tree = _tree(process)
    process.kill()
    for each in tree:
        if each.is_running():
            each.kill()


def within(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The program itself, of a process that has entered another host to run it."""
    outer = psutil.Process(process.pid)
    return outer.children()[0] if outer.name() == "nsenter" else outer


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def tail(log: Path, characters: int = 2000, *, since: int = 0) -> str:
    """The end of a log, for an error message; `since`: bytes of it that are older."""
    return log.read_bytes()[since:].decode(errors="replace")[-characters:]


def _tree(process: subprocess.Popen[bytes] | psutil.Process) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def descendants(process_id: int, word: str) -> list[psutil.Process]:
    """Processes below a process with a word in their name or title; not those that just end."""
    found = []
    for each in psutil.Process(process_id).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if word in each.name() or word in " ".join(each.cmdline()[:1]):
                found.append(each)
    return found
