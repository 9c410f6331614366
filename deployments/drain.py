"""Drains this node: Kubernetes runs it before it stops a worker's pod.

    python -m deployments.drain [--seconds 1240] [--node ID]

It tells Ray that the node will shut down in `--seconds` seconds. Serve then starts the node's
replicas elsewhere. Those here take requests until their successors do, but at most until a
deployment's `graceful_shutdown_timeout_s` before the deadline, and stop, with the node's proxy,
once their last requests are answered. The command ends when they have stopped, at the deadline, or
when the head has been silent for a minute (because the whole cluster is stopping, say). The cluster
is that of RAY_ADDRESS.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import requests
from ray.util import get_node_ip_address
from ray.util.state import list_actors, list_nodes
from ray.util.state.exception import RayStateApiException

SERVES = ("ServeReplica", "ProxyActor", "HAProxyManager")  # actors that hold requests
POLL_SECONDS = 2.0
SILENCE_SECONDS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Empty this node of Serve's replicas.")
    parser.add_argument("--seconds", type=int, default=1240, help="deadline")
    parser.add_argument("--node", metavar="ID", help="default: the one at this machine's address")
    arguments = parser.parse_args()
    print(drain(arguments.node or node_here(), arguments.seconds), flush=True)


def node_here() -> str:
    """The id of the node at this machine's address."""
    address = get_node_ip_address()
    nodes = list_nodes(filters=[("node_ip", "=", address), ("state", "=", "ALIVE")])
    if len(nodes) != 1:
        sys.exit(f"error: {address} must be one live node of the cluster, but it is {len(nodes)}")
    return str(nodes[0].node_id)


def drain(node: str, seconds: int) -> str:
    """Announce the node's end and wait until nothing serves there; returns a line with the outcome.

    Raises subprocess.CalledProcessError if Ray does not accept it.
    """
    start = time.monotonic()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
        f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=its pod is ending",
        f"--deadline-remaining-seconds={seconds}",
    ]
    subprocess.run(command, check=True, timeout=SILENCE_SECONDS)
    heard = time.monotonic()
    left: list[str] = []
    while (now := time.monotonic()) < start + seconds:
        try:
            left = serving(node)
            heard = now
        except (RayStateApiException, requests.RequestException, ConnectionError) as error:
            if now > heard + SILENCE_SECONDS:
                return f"the cluster's head does not answer: {error}"
        else:
            if not left:
                return f"nothing serves here any more, after {now - start:.0f} s"
        time.sleep(POLL_SECONDS)
    return f"still serving after {seconds} s: {', '.join(left)}"


def serving(node: str) -> list[str]:
    """The names of the actors on a node that may have requests."""
    actors = list_actors(
        filters=[("node_id", "=", node), ("state", "=", "ALIVE")], limit=1000, timeout=10
    )
    return [actor.name or "?" for actor in actors if str(actor.class_name).startswith(SERVES)]


if __name__ == "__main__":
    main()
