"""gptj_local.hosts: namespaces of their own, whose links and clocks fail when told to."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from marked_processes import MARK, marked, network_namespaces

from gptj_local import hosts
from gptj_local.hosts import obstacle

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, socket, subprocess, sys, time
from gptj_local.hosts import Network, enter_namespaces

enter_namespaces()
SERVER = '''
import socket
listening = socket.create_server(("", 9000))
print("listening", flush=True)
while True:
    client, _ = listening.accept()
    client.sendall(socket.gethostbyname(socket.gethostname()).encode())
    client.close()
'''
CLIENT = '''
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 9000), timeout=0.5) as server:
        print(server.recv(100).decode())
except OSError as error:
    print(repr(error))
'''
CLOCK = '''
import threading, time
began = time.monotonic()
slept = threading.Condition()
with slept:
    slept.wait(0.1)
time.sleep(0.1)
print(time.time(), time.monotonic() - began)
'''

with Network.start() as network:
    one, two = network.host(), network.host(clock=True)

    def run(host, *words):
        command = host.command([sys.executable, "-c", *words])
        environment = {**os.environ, **host.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    server = subprocess.Popen(one.command([sys.executable, "-c", SERVER]), stdout=subprocess.PIPE)
    server.stdout.readline()
    found = {}
    ask = lambda: run(two, CLIENT, one.address)
    found["joined"] = ask()
    network.cut(one); found["cut"] = ask(); network.mend(one)
    found["mended"] = ask()
    network.part(one, two); found["parted"] = ask()
    with socket.create_connection((one.address, 9000), timeout=5) as own:
        found["others"] = own.recv(100).decode()
    network.rejoin(one, two)
    found["rejoined"] = ask()
    for ahead in (3600, -3600, 0):
        two.set_clock(ahead)
        shown, took = map(float, run(two, CLOCK).split())
        found[f"ahead {ahead}"] = [round((shown - time.time() - ahead) / 60), took]
    print(json.dumps(found), flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of what a test starts; skips where there can be no hosts."""
    if why := obstacle(clocks=True):
        pytest.skip(why)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # SIGKILL leaves files
    return secrets.token_hex(8)


@contextmanager
def started(mark: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds)],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def test_a_link_that_is_cut_is_silent_and_works_again(mark: str) -> None:
    with started(mark, 0) as program:
        output, _ = program.communicate(timeout=120)
    assert program.returncode == 0
    found: dict[str, Any] = json.loads(output)
    for state in ("joined", "mended", "others", "rejoined"):
        assert found[state] == "198.18.0.1", found
    for state in ("cut", "parted"):
        assert found[state] == "TimeoutError('timed out')", found
    for ahead in (3600, -3600, 0):
        difference, took = found[f"ahead {ahead}"]
        assert difference == 0
        assert 0.2 <= took < 20  # waits last as long as meant
    assert not marked(mark)


# On a busy machine the program once did not end within a minute of SIGINT, in some thirty runs: why
# is not known.
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGKILL]
)
def test_nothing_is_left_of_a_program_that_is_ended(mark: str, number: signal.Signals) -> None:
    """Ctrl-C reaches all of a terminal's processes; SIGKILL only the outermost."""
    with started(mark, 600) as program:
        assert program.stdout is not None
        assert program.stdout.readline()
        assert len(network_namespaces(marked(mark) - {program.pid})) == 3
        if number == signal.SIGINT:
            os.killpg(program.pid, number)
        else:
            program.kill()
        program.wait(timeout=60)
    deadline = time.monotonic() + 30
    while marked(mark):  # a namespace without a process is gone
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda program: None if program == "ip" else "there")
    assert obstacle() == ("the program `ip` is not installed; remedy: apt-get install iproute2")


def test_missing_privileges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda program: "there")
    refusing = ["sh", "-c", "echo 'unshare failed: Operation not permitted' >&2; exit 1"]
    monkeypatch.setattr(hosts, "_unshare", lambda: refusing)
    why = obstacle()
    assert why is not None
    assert "(unshare failed: Operation not permitted); remedy: run it as root" in why
