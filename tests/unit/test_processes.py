"""Programs that we start end with us, and so do their descendants."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from gptj_local import ray as local_ray
from gptj_local.processes import descendants, free_ports, running, tail
from gptj_local.ray import LocalRay

# A parent that ignores SIGTERM and leaves a child in another session, as a crashed server would.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_program_that_ignores_sigterm_ends_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", STUBBORN]
    with running(command, environment=os.environ, log=log, grace_seconds=1) as process:
        deadline = time.monotonic() + 30
        while not log.read_text().strip():
            assert time.monotonic() < deadline and process.poll() is None, tail(log)
            time.sleep(0.05)
        child = int(log.read_text())
        assert psutil.pid_exists(child)
    assert process.poll() is not None
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_a_program_is_ended_when_the_block_raises(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(ZeroDivisionError),
        running(command, environment=os.environ, log=tmp_path / "log") as process,
    ):
        raise ZeroDivisionError
    assert process.poll() is not None


def test_descendants_are_found_although_others_end_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster starts and ends processes all the time: some are gone when their name is read."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    gone = psutil.Process(ended.pid)
    ended.wait()
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with running(command, environment=os.environ, log=tmp_path / "log") as process:
        there = psutil.Process(process.pid)
        monkeypatch.setattr(
            psutil.Process, "children", lambda parent, recursive=False: [gone, there]
        )
        assert descendants(os.getpid(), "python") == [there]
        assert descendants(os.getpid(), "no such word") == []
        monkeypatch.undo()


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_a_node_joins_although_the_dashboard_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*names: str) -> dict[str, Any]:
        nodes = [{"raylet": {"nodeId": name, "state": "ALIVE"}} for name in names]
        return {"data": {"summary": nodes}}

    answers = [answer("a"), TimeoutError("timed out"), answer("a"), answer("a", "b")]

    def get(node: LocalRay, path: str) -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    started = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(LocalRay, "_get", get)
    monkeypatch.setattr(local_ray, "running", lambda *words, **more: nullcontext(started))
    node = LocalRay(1, 2, 3, 4, tmp_path, "token", more_nodes=True)
    with node.worker(tmp_path / "log", cpus=1) as process:
        assert process is started
    assert not answers
