"""The three services on a real cluster: what only Serve's proxy and replicas can show.

Everything else about them is tested in this process, see test_serving_*.py. Some of those tests
run here again, with this module's fixture `service`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import yaml
from serve_cluster import SERVE_CONFIG, save_all, serving
from serving_client import complete, greedy, text_of
from serving_models import CONTEXT, KEYS, PROMPTS, Models
from test_serving_classification import (  # noqa: F401
    test_hugging_faces_client_classifies,
)
from test_serving_completions import (  # noqa: F401
    test_concurrent_requests_get_what_they_get_alone,
    test_openais_async_client_reads_several_streams_at_once,
    test_openais_client_reads_a_stream_and_its_usage,
)
from test_serving_edge import (  # noqa: F401
    test_a_body_after_an_upgrade_offer_is_refused,
    test_a_request_without_a_body_may_offer_an_upgrade,
    test_an_unreadable_header_is_refused,
    test_any_bytes_are_allowed_in_other_headers,
    test_any_time_limit_is_accepted,
    test_routes_answer_to_head_and_with_a_slash_at_the_end,
    test_websocket_is_refused_with_the_reason,
)
from test_serving_embeddings import (  # noqa: F401
    embedder,
    test_openais_client_gets_the_reference_vectors,
    test_routes_do_not_collide_with_the_generation_services,
    theirs,
)
from test_serving_http import (  # noqa: F401
    test_a_body_that_is_too_large_is_refused,
    test_a_full_queue_answers_429_with_retry_after_and_takes_requests_again,
    test_each_key_is_valid,
    test_openais_client_succeeds_on_a_full_service_by_retrying,
    test_without_a_valid_key_only_health_answers,
)
from test_serving_question_answering import (  # noqa: F401
    test_hugging_faces_client_gets_the_best_span_over_all_windows,
)

from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow

CALLERS = 8
SCALING_SECONDS = 300  # for the controller to notice, and a replica to start or end


@dataclass(frozen=True)
class Deployed:
    address: str
    node: LocalRay
    config: dict[str, Any]

    def applications(self) -> dict[str, Any]:
        """What Serve says of them, by name."""
        found: dict[str, Any] = self._ask("GET").json()["applications"]
        return found

    def add(self, application: dict[str, Any]) -> None:
        applications = [*self.config["applications"], application]
        self._ask("PUT", json={**self.config, "applications": applications})

    def _ask(self, method: str, **content: Any) -> httpx.Response:
        return httpx.request(
            method,
            f"{self.node.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.node.token}"},
            timeout=60,
            **content,
        ).raise_for_status()


@pytest.fixture(scope="module")
def deployed(
    models: Models, s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """The three services, embeddings, and one behind a key (/guarded)."""
    folder = tmp_path_factory.mktemp("services")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        save_all(config, models, "s3://gptj/test-deployments")
        guarded = json.loads(json.dumps(config["applications"][0]))
        guarded |= {"name": "guarded", "route_prefix": "/guarded"}
        guarded["args"] |= {"max_num_seqs": 1, "max_queued": 1, "model_name": "org/guarded"}
        options = guarded["deployments"][0]["ray_actor_options"]
        options["runtime_env"] = {"env_vars": {"GPTJ_API_KEYS": KEYS}}
        config["applications"] += [guarded, embeddings(config["applications"])]
        with serving(config, folder) as (address, node):
            yield Deployed(address, node, config)


@pytest.fixture(scope="module")
def service(deployed: Deployed) -> str:
    return deployed.address


def embeddings(applications: list[dict[str, Any]]) -> dict[str, Any]:
    """An application that embeds with the generation application's checkpoint."""
    arguments = {"checkpoint": applications[0]["args"]["checkpoint"], "dtype": "float32"}
    deployment = json.loads(json.dumps(applications[1]["deployments"][0]))
    return {
        "name": "embeddings",
        "route_prefix": "/v1/embeddings",
        "import_path": "deployments.embeddings:build",
        "args": {**arguments, "model_name": "embedder"},
        "deployments": [{**deployment, "name": "embeddings"}],
    }


def test_openais_client_shows_the_raw_reply(client: openai.OpenAI, models: Models) -> None:
    raw = client.completions.with_raw_response.create(
        model="generation", prompt=PROMPTS[0], max_tokens=12, temperature=0
    )
    assert (raw.status_code, raw.retries_taken) == (200, 0)
    assert raw.headers["content-type"] == "application/json"
    reply = raw.parse()
    assert reply.choices[0].text == text_of(models, greedy(models, PROMPTS[0]))
    assert reply._request_id == raw.headers["x-request-id"]
    assert reply.id == f"cmpl-{reply._request_id}"


def test_a_disconnected_client_frees_the_engine(service: str) -> None:
    """The next would wait for two thousand steps, and waits for fewer than six hundred."""
    long: dict[str, Any] = {"prompt": "x", "temperature": 1, "n": 64, "ignore_eos": True}
    started = time.monotonic()
    complete(service, **long, max_tokens=20)
    twenty = time.monotonic() - started
    long["max_tokens"] = CONTEXT - 10
    for stream in (True, False):
        started = time.monotonic()
        if stream:
            url = f"{service}/v1/completions"
            with httpx.stream("POST", url, json={**long, "stream": True}) as reply:
                lines = reply.iter_lines()  # by a name, since its end would be the stream's
                assert next(lines).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{service}/v1/completions", json=long, timeout=1)
        complete(service, prompt="x", max_tokens=1)
        assert time.monotonic() - started < 30 * twenty + 1


def test_every_service_is_still_healthy(service: str) -> None:
    for route in ("/health", "/classification/health", "/question-answering/health"):
        reply = httpx.get(service + route)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_a_training_without_room_is_told_which_services_have_it(deployed: Deployed) -> None:
    """In a process of its own, since Ray reads its token once."""
    script = (
        "import ray; from gptj_jobs import room; ray.init(logging_level='ERROR');"
        "room.ROOM_SECONDS = 0;"
        "room.wait_for_room({'CPU': 4})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **deployed.node.environment()},
        capture_output=True,
        text=True,
    )
    # How many are free depends on how busy the machine is: replicas may have been added.
    assert re.search(r"need 4 CPUs, but [\d.]+ of the cluster's 4 are free", done.stderr), done
    assert "held by" in done.stderr and "the service classification (0.5)" in done.stderr


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


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SCALING_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.3)
    return False


def test_replicas_rise_under_load_and_fall_after_it_without_a_failed_request(
    deployed: Deployed,
) -> None:
    """The generation service once more, deployed beside the others."""
    scaled = copy.deepcopy(deployed.config["applications"][0])
    scaled |= {"name": "scaled", "route_prefix": "/scaled"}
    (deployment,) = scaled["deployments"]
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

    def running_replicas() -> int:
        replicas = deployed.applications()["scaled"]["deployments"]["generation"]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    deployed.add(scaled)
    address = f"{deployed.address}/scaled"
    assert wait_for(lambda: deployed.applications().get("scaled", {}).get("status") == "RUNNING"), (
        "not deployed"
    )
    assert running_replicas() == 1
    load = Load(address)
    try:
        load.start(CALLERS)
        assert wait_for(lambda: running_replicas() == 2), "no second replica under load"
        before = len(load.replies)
        assert wait_for(lambda: len(load.replies) > before + CALLERS), "no replies from two"
        # One goes on asking, so that a replica ends while there are requests.
        load.lower_to(1)
        assert wait_for(lambda: running_replicas() == 1), "no replica less after the load"
        after = len(load.replies)
        assert wait_for(lambda: len(load.replies) > after), "no reply from the one that is left"
    finally:
        load.lower_to(0)
    assert set(load.replies) == {200}
