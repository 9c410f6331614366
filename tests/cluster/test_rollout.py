"""`serve deploy` over a running service: no request fails, and a bad deploy changes nothing.

Nor when Kubernetes ends a pod: deployments.drain empties its node first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from large_models import enlarge

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    GPTJTokenizer,
    storage,
)
from gptj.storage.file_lock import FileLock
from gptj_local.processes import HOST, free_ports
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

pytestmark = pytest.mark.slow

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"
SUPPORT = Path(__file__).resolve().parents[1] / "support"
PATIENCE_SECONDS = 300
TEXTS = ("A fine film", "A dull film")


@dataclass
class Rollout:
    """A cluster with the classification service, which `serve deploy` has brought up."""

    folder: Path
    models: str  # address of the folder of all models
    node: LocalRay
    environment: dict[str, str]
    of_worker: dict[str, str]
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/classification"

    def deploy(
        self,
        model: str,
        *,
        port: int | None = None,
        by_command: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        """The application of serve.yaml with another checkpoint.

        Args:
            environment: further variables of the application.
            by_command: as people do it; else what the command sends, without its start.
        """
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        (application,) = (a for a in config["applications"] if a["name"] == "classification")
        application["args"] |= {"checkpoint": f"{self.models}/{model}", "dtype": "float32"}
        if environment is not None:
            application["runtime_env"] = {"env_vars": environment}
        # The nodes share one address, so their proxies would share one port: one that has just
        # started, or is about to end, answers as no pod does that a Kubernetes service asks.
        config |= {"applications": [application], "proxy_location": "HeadOnly"}
        config["http_options"] |= {"host": HOST, "port": port or self.port}
        if not by_command:
            self.put(config)
            return
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "serve"), "deploy", str(path)]
        command += ["--address", self.node.dashboard]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def put(self, config: dict[str, Any]) -> None:
        self._applications("PUT", json=config).raise_for_status()

    def application(self) -> dict[str, Any]:
        return self._applications("GET").json()["applications"].get("classification", {})

    def _applications(self, method: str, json: Any = None) -> httpx.Response:
        return httpx.request(
            method,
            f"{self.node.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.node.token}"},
            json=json,
            timeout=60,
        )

    def replicas(self, state: str) -> list[str]:
        deployments = self.application().get("deployments", {})
        replicas = deployments.get("classification", {}).get("replicas", [])
        return [each["replica_id"] for each in replicas if each["state"] == state]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, json.dumps(self.application(), indent=1)
            time.sleep(0.2)

    def label(self) -> str:
        """The model's answer, which tells it from others."""
        reply = httpx.post(f"{self.url}/", json={"inputs": TEXTS[0]}, timeout=30)
        assert reply.status_code == 200, reply.text
        return str(reply.json()[0][0]["label"])


def save(address: str, label: str, cls: type = GPTJForSequenceClassification) -> None:
    """A tiny model that has one answer for everything."""
    tokenizer = GPTJTokenizer.train(TEXTS, vocab_size=270)
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=32,
        n_layer=1,
        n_head=4,
        rotary_dim=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label={0: label, 1: label},
    )
    cls(config).save_pretrained(address, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rollout(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    """As on Kubernetes: no replicas on the head, and only the worker may read S3."""
    folder = tmp_path_factory.mktemp("rollout")
    models = "s3://gptj/test-rollout"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        for name in ("first", "second", "altered"):
            save(f"{models}/{name}", name)
        save(f"{models}/another-head", "", GPTJForCausalLM)
        weights = storage.read_bytes(f"{models}/second/model.safetensors")
        altered = weights[:-1] + bytes([weights[-1] ^ 1])
        storage.write_bytes(f"{models}/altered/model.safetensors", altered)
        save(f"{models}/too-large", "")
        enlarge(f"{models}/too-large")
    environment = {
        **os.environ,
        "TMPDIR": str(folder),  # where replicas wait for their turn to load
        "PYTHONPATH": str(SUPPORT),
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    }
    of_worker = {**environment, **s3_server.environment()}
    (port,) = free_ports(1)
    with ExitStack() as stack:
        head = LocalRay.start(folder, cpus=0, environment=environment, more_nodes=True)
        node = stack.enter_context(head)
        log = folder / "worker.log"
        stack.enter_context(node.worker(log, cpus=2, environment=of_worker))
        of_client = {**environment, **node.environment()}
        started = Rollout(folder, models, node, of_client, of_worker, port)
        started.deploy("first", by_command=True)
        started.wait_until(lambda: started.application().get("status") == "RUNNING")
        yield started


@dataclass
class Client:
    """Sends one request after another for the length of a block; each must be answered."""

    rollout: Rollout
    labels: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Client:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.labels.append(self.rollout.label())
            except (httpx.TransportError, AssertionError) as error:
                self.labels.append(repr(error))
            time.sleep(0.02)


def test_the_old_model_answers_until_the_new_one_is_loaded(
    rollout: Rollout,
) -> None:
    """The new replica is held up while it loads: a request that waited for it would hang."""
    (place,) = rollout.folder.glob("gptj-loading-*/place-0")
    with Client(rollout) as client, FileLock(place) as loading:
        loading.take()
        rollout.deploy("second", port=free_ports(1)[0])
        rollout.wait_until(lambda: len(rollout.replicas("STARTING")) == 1)
        assert len(rollout.replicas("RUNNING")) == 1
        answered = len(client.labels)
        rollout.wait_until(lambda: len(client.labels) > answered + 20)
        assert set(client.labels) == {"first"}
        loading.close()
        rollout.wait_until(lambda: client.labels[-1] == "second")
        rollout.wait_until(lambda: rollout.application()["status"] == "RUNNING")
    # No failure in between; and the changed port was ignored, as our documents say.
    assert set(client.labels) == {"first", "second"}
    assert client.labels == sorted(client.labels)


def test_a_bad_checkpoint_is_refused_before_any_replica_starts(rollout: Rollout) -> None:
    """Of another head, which the worker alone can see; for more see test_preflight.py."""
    label = rollout.label()
    with Client(rollout) as client:
        rollout.deploy("another-head")
        rollout.wait_until(lambda: rollout.application()["status"] == "DEPLOY_FAILED")
        answered = len(client.labels)
        rollout.wait_until(lambda: len(client.labels) > answered + 10)
    assert set(client.labels) == {label}
    message = rollout.application()["message"]
    assert re.search(
        "the checkpoint cannot be deployed: .*is a GPTJForCausalLM, and this deployment serves a "
        "GPTJForSequence",
        message,
    )
    assert "Traceback" not in message


def test_a_deploy_while_s3_is_away_is_refused(rollout: Rollout) -> None:
    """With the reason; nothing has been asked to stop."""
    label = rollout.label()
    (closed,) = free_ports(1)
    with Client(rollout) as client:
        away = {"AWS_ENDPOINT_URL": f"http://{HOST}:{closed}"}
        rollout.deploy("second", environment=away)
        rollout.wait_until(lambda: rollout.application()["status"] == "DEPLOY_FAILED")
        answered = len(client.labels)
        rollout.wait_until(lambda: len(client.labels) > answered + 10)
    assert set(client.labels) == {label}
    message = rollout.application()["message"]
    assert re.search(rf"the checkpoint cannot be deployed: .*{HOST}:{closed}", message), message


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("altered", "was altered after it was written"),
        ("too-large", r"too-large does not fit: its weights take [\d.]+ GB in float32"),
    ],
)
def test_the_old_model_stays_if_loading_the_new_one_fails(
    rollout: Rollout, model: str, reason: str
) -> None:
    """And after the failed deploy a good one takes over."""
    label = rollout.label()
    (good,) = {"first", "second"} - {label}
    with Client(rollout) as client:
        rollout.deploy(model)
        rollout.wait_until(lambda: rollout.application()["status"] == "DEPLOY_FAILED")
        answered = len(client.labels)
        rollout.wait_until(lambda: len(client.labels) > answered + 10)
        assert set(client.labels) == {label}
        message = rollout.application()["deployments"]["classification"]["message"]
        assert re.search(reason, message), message
        rollout.deploy(good)
        rollout.wait_until(lambda: client.labels[-1] == good)
        rollout.wait_until(lambda: rollout.application()["status"] == "RUNNING")
    assert set(client.labels) == {label, good}


@dataclass(frozen=True)
class Slow:
    url: str  # answers with the id of the node that its replica is on
    environment: dict[str, str]  # of a pod


@pytest.fixture(scope="module")
def slow(rollout: Rollout) -> Iterator[Slow]:
    """A service of one replica instead; there is room for it on either of two workers."""
    with rollout.node.worker(rollout.folder / "other.log", cpus=1, environment=rollout.of_worker):
        rollout.put(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": HOST, "port": rollout.port},
                "applications": [{"name": "slow", "import_path": "slow_service:app"}],
            }
        )
        url = f"http://{HOST}:{rollout.port}/"
        rollout.wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
        of_a_pod = dict(rollout.environment)
        del of_a_pod["RAY_API_SERVER_ADDRESS"]
        yield Slow(url, of_a_pod)


def test_a_drained_node_finishes_its_requests_and_new_ones_go_elsewhere(slow: Slow) -> None:
    """The command itself, without the variables that a pod does not have.

    There is time for the successor to start first, so that no request waits for it.
    """
    first = httpx.get(slow.url, timeout=30).text
    drained = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        last = pool.submit(httpx.get, slow.url, params={"seconds": 8}, timeout=60)
        time.sleep(1)
        meanwhile = pool.submit(_ask, slow.url, drained)
        command = [sys.executable, "-m", "deployments.drain", "--seconds=180", f"--node={first}"]
        try:
            done = subprocess.run(command, env=slow.environment, capture_output=True, text=True)
        finally:
            drained.set()
        assert last.done(), "the drain did not wait for the request"
    assert done.returncode == 0 and "nothing serves here any more" in done.stdout, done
    assert (last.result().status_code, last.result().text) == (200, first)
    nodes = meanwhile.result()
    change = len(list(takewhile(lambda node: node == first, nodes)))
    assert change > 0 and first not in nodes[change:] and len(set(nodes[change:])) == 1, nodes
    assert httpx.get(slow.url, timeout=30).text == nodes[-1]


def _ask(url: str, ended: threading.Event) -> list[str]:
    """The nodes that answered, one request after another; each must be answered."""
    nodes = []
    while not ended.is_set():
        reply = httpx.get(url, timeout=30)
        assert reply.status_code == 200, reply.text
        nodes.append(reply.text)
        time.sleep(0.1)
    return nodes


def test_draining_also_waits_for_the_proxy(slow: Slow) -> None:
    """The command waits for both kinds of actors, by the names that Ray gives their classes."""
    script = (
        "from ray.util.state import list_nodes; from deployments.drain import serving; "
        "print([[*map(str, serving(node.node_id))] for node in list_nodes() if node.is_head_node])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=slow.environment, capture_output=True, text=True
    )
    assert re.fullmatch(r"\[\['SERVE_PROXY_ACTOR-\w+'\]\]\n", done.stdout), done
