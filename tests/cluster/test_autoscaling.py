"""Under load a service gets a second replica, and loses it after; no request notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from serve_cluster import SERVE_CONFIG, save_all, serving
from serving_models import CONTEXT, make_models

from gptj_local.ray import LocalRay

pytestmark = pytest.mark.slow

CALLERS = 8
SECONDS = 300  # for the controller to notice, and a replica to start or end


class Load:
    """Callers that send one request after another, and count what they get."""

    def __init__(self, address: str) -> None:
        self.replies: list[int | str] = []
        self._address = address
        self._ends: list[threading.Event] = []
        self._threads: list[threading.Thread] = []

    def start(self, callers: int) -> None:
        for _ in range(callers):
            end = threading.Event()
            thread = threading.Thread(target=self._call, args=(end,))
            thread.start()
            self._ends.append(end)
            self._threads.append(thread)

    def lower_to(self, callers: int) -> None:
        while len(self._threads) > callers:
            self._ends.pop().set()
            self._threads.pop().join()

    def _call(self, end: threading.Event) -> None:
        body = {"prompt": "The tower", "max_tokens": 100, "ignore_eos": True, "seed": 1}
        with httpx.Client(timeout=300) as client:
            while not end.is_set():
                try:
                    reply = client.post(f"{self._address}/v1/completions", json=body)
                    complete = reply.json()["usage"]["completion_tokens"] == 100
                    self.replies.append(reply.status_code if complete else reply.text)
                except (httpx.TransportError, KeyError, ValueError) as error:  # no JSON, say
                    self.replies.append(repr(error))


def running_replicas(node: LocalRay) -> int:
    """Those of the generation service that take requests, by Serve's own status."""
    reply = httpx.get(
        f"{node.dashboard}/api/serve/applications/",
        headers={"Authorization": f"Bearer {node.token}"},
        timeout=30,
    )
    deployment = reply.json()["applications"]["generation"]["deployments"]["generation"]
    return sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.3)
    return False


def test_replicas_rise_under_load_and_fall_after_it_without_a_failed_request(
    tmp_path: Path,
) -> None:
    assert CONTEXT > 200
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    config["applications"] = config["applications"][:1]
    save_all(config, make_models(), str(tmp_path / "models"))
    (deployment,) = config["applications"][0]["deployments"]
    # The file's own limits, with everything faster: less load, and no patience.
    assert deployment["autoscaling_config"]["min_replicas"] == 1
    assert deployment["autoscaling_config"]["max_replicas"] >= 2
    deployment["autoscaling_config"] |= {
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "metrics_interval_s": 0.3,
        "look_back_period_s": 1,
    }
    with serving(config, tmp_path) as (address, node):
        assert running_replicas(node) == 1
        load = Load(address)
        try:
            load.start(CALLERS)
            assert wait_for(lambda: running_replicas(node) == 2), "no second replica under load"
            before = len(load.replies)
            assert wait_for(lambda: len(load.replies) > before + CALLERS), "no replies from two"
            # One goes on asking, so that a replica ends while there are requests.
            load.lower_to(1)
            assert wait_for(lambda: running_replicas(node) == 1), "no replica less after the load"
            after = len(load.replies)
            assert wait_for(lambda: len(load.replies) > after), "no reply from the one that is left"
        finally:
            load.lower_to(0)
    assert set(load.replies) == {200}
