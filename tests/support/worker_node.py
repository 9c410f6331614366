"""A second node for a local Ray cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kuberay import nodes_alive

from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.ray import LocalRay

START_SECONDS = 90


@contextmanager
def worker_node(
    head: LocalRay, log: Path, *, cpus: int, environment: Mapping[str, str]
) -> Iterator[None]:
    """One more node for the length of the block, whose workers see `environment`.

    It has joined the cluster when the block begins: two raylets of one machine that start at the
    same time may choose the same names for their sockets, and one ends.
    """
    alive = nodes_alive(head.dashboard, head.token)
    agent, metrics = free_ports(2)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--block"),
        *(f"--address={HOST}:{head.port}", f"--num-cpus={cpus}"),
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
    ]
    variables = {**environment, **head.environment()}
    with running(command, environment=variables, log=log, grace_seconds=2) as process:
        deadline = time.monotonic() + START_SECONDS
        while nodes_alive(head.dashboard, head.token) <= alive:
            assert process.poll() is None and time.monotonic() < deadline, tail(log)
            time.sleep(0.2)
        yield
