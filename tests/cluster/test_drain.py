"""deployments.drain, which Kubernetes runs before it ends a pod, on a cluster of three nodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from gptj_local.processes import HOST, free_ports
from gptj_local.ray import LocalRay

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"


@dataclass(frozen=True)
class Service:
    url: str  # answers with the id of the node that its replica is on
    environment: dict[str, str]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of one replica; there is room for it on either of two workers."""
    folder = tmp_path_factory.mktemp("drain")
    environment = {
        **os.environ,
        "PYTHONPATH": str(SUPPORT),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    }
    with ExitStack() as stack:
        node = stack.enter_context(LocalRay.start(folder, cpus=0, environment=environment))
        for number in range(2):
            log = folder / f"worker-{number}.log"
            stack.enter_context(node.worker(log, cpus=1, environment=environment))
        (port,) = free_ports(1)
        config = {
            # The nodes share one address, so their proxies would share one port: one that has just
            # started, or is about to end, answers as no pod does that a Kubernetes service asks.
            "proxy_location": "HeadOnly",
            "http_options": {"host": HOST, "port": port},
            "applications": [{"name": "slow", "import_path": "slow_service:app"}],
        }
        httpx.put(
            f"{node.dashboard}/api/serve/applications/",
            json=config,
            headers={"Authorization": f"Bearer {node.token}"},
            timeout=60,
        ).raise_for_status()
        url = f"http://{HOST}:{port}/"
        deadline = time.monotonic() + 90
        while not _answers(url):
            assert time.monotonic() < deadline, (folder / "ray.log").read_text()
            time.sleep(0.2)
        of_a_pod = {**environment, **node.environment()}
        del of_a_pod["RAY_API_SERVER_ADDRESS"]
        yield Service(url, of_a_pod)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_a_drained_node_finishes_its_requests_and_new_ones_go_elsewhere(service: Service) -> None:
    """The command itself, without the variables that a pod does not have.

    There is time for the successor to start first, so that no request waits for it.
    """
    first = httpx.get(service.url, timeout=30).text
    drained = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        last = pool.submit(httpx.get, service.url, params={"seconds": 8}, timeout=60)
        time.sleep(1)
        meanwhile = pool.submit(_ask, service.url, drained)
        command = [sys.executable, "-m", "deployments.drain", "--seconds=180", f"--node={first}"]
        try:
            done = subprocess.run(command, env=service.environment, capture_output=True, text=True)
        finally:
            drained.set()
        assert last.done(), "the drain did not wait for the request"
    assert done.returncode == 0 and "nothing serves here any more" in done.stdout, done
    assert (last.result().status_code, last.result().text) == (200, first)
    nodes = meanwhile.result()
    change = len(list(takewhile(lambda node: node == first, nodes)))
    assert change > 0 and first not in nodes[change:] and len(set(nodes[change:])) == 1, nodes
    assert httpx.get(service.url, timeout=30).text == nodes[-1]


def _ask(url: str, ended: threading.Event) -> list[str]:
    """The nodes that answered, one request after another; each must be answered."""
    nodes = []
    while not ended.is_set():
        reply = httpx.get(url, timeout=30)
        assert reply.status_code == 200, reply.text
        nodes.append(reply.text)
        time.sleep(0.1)
    return nodes


def test_draining_also_waits_for_the_proxy(service: Service) -> None:
    """The command waits for both kinds of actors, by the names that Ray gives their classes."""
    script = (
        "from ray.util.state import list_nodes; from deployments.drain import serving; "
        "print([[*map(str, serving(node.node_id))] for node in list_nodes() if node.is_head_node])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=service.environment, capture_output=True, text=True
    )
    assert re.fullmatch(r"\[\['SERVE_PROXY_ACTOR-\w+'\]\]\n", done.stdout), done
