"""A single-node Ray cluster for local use, on free ports of loopback and with its own token.

`with LocalRay.start(folder, cpus=4) as ray_node:` gives a running node; processes with its
`environment()` (ray job submit, serve run, ray.init) talk only to this cluster.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from gptj_local.processes import HOST, LOOPBACK, Host, free_ports, running, tail

START_SECONDS = 120
SESSIONS = "gptj-ray-"  # begins the names of the folders of Ray's files
GAVE_UP = "The current node timed out during startup"  # `ray start`, after 30 seconds
JOBS = {  # of submitted jobs
    # For a training's last step and checkpoint. By default `ray job stop` kills it after 3 seconds.
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}
SERVE = {  # of Serve, if it runs there: Ray's processes read these when they start
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares",
    # A replica that hangs does not end gracefully: its requests would wait for that.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # A dead proxy is replaced after three checks. Each is a call of a millisecond.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.1",
}
HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
HAPROXY = {  # with HAProxy in place of Serve's proxies, besides deployments/haproxy.py
    HAPROXY_SWITCH: "1",
    # A HAProxy that a reload has replaced ends after this many seconds, whatever it still holds: as
    # long as a request may take, see serve.yaml.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "610",
    # For a client to read some of its reply.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
}
# Ray's setting for clusters of one node, "0" by default on macOS and Windows: its servers, that of
# metrics included, are on 127.0.0.1 alone, and clients look for them there. With "1" they are on
# all interfaces, as other nodes need.
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True)
class LocalRay:
    port: int  # the head's, where drivers connect
    dashboard_port: int  # where jobs are submitted
    metrics_port: int  # scraped by Prometheus
    process_id: int
    logs: Path  # Ray's and Serve's; gone with the node
    token: str = field(repr=False)  # required by every call to the cluster
    more_nodes: bool = False  # whether others can join
    address: str = HOST

    @property
    def sessions(self) -> Path:
        """The folder of Ray's files, the logs included."""
        return self.logs.parents[1]

    @property
    def dashboard(self) -> str:
        return f"http://{self.address}:{self.dashboard_port}"

    def environment(self) -> dict[str, str]:
        """The variables that make Ray's commands and `ray.init()` use this cluster."""
        return {
            **_authentication(self.token),
            CLUSTER_VARIABLE: str(int(self.more_nodes)),
            "RAY_ADDRESS": f"{self.address}:{self.port}",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_DASHBOARD_ADDRESS": self.dashboard,  # for serve deploy, status and shutdown
        }

    @classmethod
    @contextmanager
    def start(
        cls,
        folder: Path,
        *,
        cpus: int,
        environment: Mapping[str, str] = os.environ,
        more_nodes: bool = False,
        host: Host = LOOPBACK,
    ) -> Iterator[LocalRay]:
        """Run a head node with `cpus` logical CPUs whose workers see `environment`.

        With `more_nodes` others can join (`worker`), and Ray listens on all interfaces of `host`.
        Its log is `folder`/ray.log. Raises RuntimeError with the end of that log if it does not
        come up within two minutes.
        """
        token = secrets.token_hex(32)
        head, dashboard, agent, client, metrics, autoscaler, dashboards = free_ports(7)
        log = folder / "ray.log"
        # Ray's socket paths must stay under 107 bytes, which the user's folder may exceed.
        prefix = SESSIONS if host.temporary is None else "ray-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=host.temporary) as sessions:
            command = [
                str(Path(sys.executable).parent / "ray"),
                "start",
                "--head",
                "--block",
                *_node_address(host),
                f"--port={head}",
                "--dashboard-host=" + host.address,
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}",
                f"--metrics-export-port={metrics}",
                f"--num-cpus={cpus}",
                f"--temp-dir={sessions}",
                "--disable-usage-stats",
            ]
            variables = {
                **JOBS,
                **environment,
                **host.environment,
                **_authentication(token),
                CLUSTER_VARIABLE: str(int(more_nodes)),
                "PATH": _path(environment),
                # Ray Train's own look-ups in its workers: without it they guess, and beside another
                # cluster of this machine end in a traceback.
                "RAY_API_SERVER_ADDRESS": f"http://{host.address}:{dashboard}",
                # The autoscaler's and the dashboard's own metrics. At Ray's fixed ports only one
                # cluster of a machine has them, and the others announce addresses that refuse.
                "AUTOSCALER_METRIC_PORT": str(autoscaler),
                "DASHBOARD_METRIC_PORT": str(dashboards),
                **_serve(environment, Path(sessions)),
            }
            node = cls(
                *(head, dashboard, metrics),
                process_id=0,  # there is none yet
                logs=Path(sessions) / "session_latest" / "logs",
                token=token,
                more_nodes=more_nodes,
                address=host.address,
            )
            with node_program(
                host.command(command), environment=variables, log=log, is_up=node._answers
            ) as process:
                yield replace(node, process_id=process.pid)

    @contextmanager
    def worker(
        self,
        log: Path,
        *,
        cpus: int,
        environment: Mapping[str, str] = os.environ,
        host: Host = LOOPBACK,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """One more node for the length of the block, whose workers see `environment`.

        Of a cluster with `more_nodes`. It has joined the cluster when the block begins: two raylets
        of one machine that start at the same time may choose the same names for their sockets, and
        one ends. Raises RuntimeError with the end of its log if it has not joined in two minutes.
        """
        assert self.more_nodes
        before = self._nodes_alive()
        agent, metrics = free_ports(2)
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--block"),
            *(f"--address={self.address}:{self.port}", f"--num-cpus={cpus}"),
            *_node_address(host),
            f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}",
        ]
        variables = {
            **environment,
            **host.environment,
            **self.environment(),
            "PATH": _path(environment),
            **_serve(environment, log.parent),
        }
        with node_program(
            host.command(command),
            environment=variables,
            log=log,
            is_up=lambda: self._has_more_than(before),
        ) as process:
            yield process

    def _has_more_than(self, before: set[str]) -> bool:
        """Whether a node has joined since; one that died meanwhile does not count."""
        try:
            return not self._nodes_alive() <= before
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False  # a busy dashboard; the caller has the timeout

    def _nodes_alive(self) -> set[str]:
        summary = self._get("/nodes?view=summary")["data"]["summary"]
        raylets = [node["raylet"] for node in summary]
        return {each["nodeId"] for each in raylets if each["state"] == "ALIVE"}

    def _answers(self) -> bool:
        """Whether the jobs API accepts requests and the node has joined its cluster."""
        try:
            self._get("/api/jobs/")
            nodes = self._get("/api/v0/nodes?limit=1")
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False  # not yet; the caller has the timeout
        return bool(nodes["result"] and nodes["data"]["result"]["total"])

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=5) as reply:
            return json.load(reply)


@contextmanager
def node_program(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    is_up: Callable[[], bool],
    start_seconds: float = START_SECONDS,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start --block` for the length of the block, which begins when the node is up.

    On a busy machine a node may take longer than the half minute that `ray start` gives it: then it
    is started again. Raises RuntimeError with the end of the log if the program ends for another
    reason, or after `start_seconds`.
    """
    deadline = time.monotonic() + start_seconds
    while True:
        before = log.stat().st_size if log.exists() else 0
        # A raylet may take half a minute to leave its cluster, and nothing here needs that.
        with running(command, environment=environment, log=log, grace_seconds=2) as process:
            while not is_up():
                if process.poll() is not None or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            else:
                yield process
                return
        output = tail(log, since=before)
        if GAVE_UP not in output or time.monotonic() > deadline:
            raise RuntimeError(
                f"the Ray node did not come up (exit status {process.returncode}); the end of "
                f"{log}:\n{output}"
            )


def _node_address(host: Host) -> list[str]:
    """For Ray, which finds a machine's address by itself."""
    return [] if host is LOOPBACK else [f"--node-ip-address={host.address}"]


def _serve(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """SERVE, and with HAProxy what it needs; `folder` gets a program that Ray can execute."""
    if environment.get(HAPROXY_SWITCH) != "1":
        return SERVE
    deployments = find_spec("deployments")  # which takes seconds to import
    assert deployments is not None
    assert deployments.origin is not None
    program = folder / "haproxy"
    # The module itself is not executable where it was installed from a wheel.
    module = Path(deployments.origin).with_name("haproxy.py")
    program.write_text(f'#!/bin/sh\nexec {quote(sys.executable)} {quote(str(module))} "$@"\n')
    program.chmod(0o700)
    # Of Ray's ports a machine has only one each, and it may have several clusters.
    stats, metrics, fallback = free_ports(3)
    return {
        **SERVE,
        **HAPROXY,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program.resolve()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
    }


def _authentication(token: str) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _path(environment: Mapping[str, str]) -> str:
    """PATH with our Python first, for job entry points that use `#!/usr/bin/env python`."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
