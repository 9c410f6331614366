"""The manifests of k8s/overlays/local, executed: their processes, variables, job and services.

KubeRay and its pods are played by tests/support/kuberay.py; Ray, Redis, S3 and HTTP are real.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import k8s_metrics
import psutil
import pytest
import yaml
from kuberay import Cluster, Here, Pod
from manifests import ROOT, Object, build, named
from serving_models import make_models

from gptj import storage
from gptj.checkpoints import manifest
from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.s3 import LocalS3

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-test"
JOB_SECONDS = 480
DEPLOY_SECONDS = 300
METRICS_SECONDS = 30
# What no request of this module brings about, and so is not exported yet.
UNCOUNTED = (
    "ray_gptj_proxy_refusals_total",
    "ray_gptj_engine_preemptions_total",
    "ray_gptj_engine_cancellations_total",
    "ray_gptj_engine_prefix_tokens_hit_total",
    "ray_gptj_engine_spec_decode_num_draft_tokens_total",
    "ray_gptj_engine_spec_decode_num_accepted_tokens_total",
)
# Of the three trainings of the overlay one runs, and of its 400 steps three, on one worker.
TRAINING = "quickstart-generation.yaml"
SMALLER = {
    "steps": 3,
    "checkpoint_every": 3,
    "log_every": 1,
    "batch_size": 4,
    "micro_batch_size": 2,
}
SMALLER_MODEL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    """The namespace, serving and training on a laptop's cluster."""
    return build("local")


@dataclass
class Redis:
    """Debian's, with the settings of the manifest but for the folder, the port and the host."""

    program: str
    folder: Path
    settings: str
    port: int
    password: str = ""
    process: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self, password: str) -> None:
        """Also anew, as when its pod is restarted: its disk is what it was."""
        self.process.close()
        self.password = password
        path, log = self.folder / "redis.conf", self.folder / "redis.log"
        text = self.settings.replace("dir /data", f"dir {self.folder}")
        path.write_text(f"{text}\nport {self.port}\nbind {HOST}\nrequirepass {password}\n")
        process = self.process.enter_context(
            running([self.program, str(path)], environment={}, log=log)
        )
        while b"PONG" not in redis_answer(self.port, password):
            assert process.poll() is None, tail(log)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def redis(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server; remedy: apt-get install redis-server")
    container = named(objects, "StatefulSet", "redis")["spec"]["template"]["spec"]
    (settings,) = (each for each in container["volumes"] if "configMap" in each)
    text = named(objects, "ConfigMap", settings["configMap"]["name"])["data"]["redis.conf"]
    found = Redis(program, tmp_path_factory.mktemp("redis"), text, free_ports(1)[0])
    with found.process:
        found.start(secrets.token_hex(16))
        yield found


def redis_answer(port: int, password: str) -> bytes:
    try:
        with socket.create_connection((HOST, port), timeout=5) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            time.sleep(0.05)
            return connection.recv(100)
    except ConnectionError:
        return b""


@pytest.fixture(scope="module")
def here(s3_server: LocalS3, redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Here:
    """All that is different on this machine; kuberay.Here says more."""
    folder = tmp_path_factory.mktemp("cluster")
    return Here(
        folder=folder,
        workdir=image(folder / "image"),
        serve_port=free_ports(1)[0],
        names={
            "http://seaweedfs:8333": s3_server.endpoint,
            "redis:6379": redis.address,
            "/var/cache/gptj": str(folder / "checkpoints"),
            "/var/cache/huggingface": str(folder / "hub"),
        },
        secrets={
            ("s3", "AWS_ACCESS_KEY_ID"): s3_server.access_key,
            ("s3", "AWS_SECRET_ACCESS_KEY"): s3_server.secret_key,
            ("redis", "password"): redis.password,
            ("api-keys", "GPTJ_API_KEYS"): KEY,
        },
    )


def image(folder: Path) -> Path:
    """The image's working directory: the project's, with smaller trainings."""
    settings = folder / "jobs" / "settings"
    settings.mkdir(parents=True)
    for path in (ROOT / "jobs").iterdir():
        if path.name not in ("settings", "__pycache__"):
            (folder / "jobs" / path.name).symlink_to(path)
    training = yaml.safe_load((ROOT / "jobs" / "settings" / TRAINING).read_text())
    training |= SMALLER
    training["model"] = {"config": SMALLER_MODEL}
    training["tokenizer"] = {"vocab_size": 512}
    training["data"] = {"sequence_length": 64}
    training["optimizer"]["warmup_steps"] = 1
    training["workers"] = {"count": 1}
    (settings / TRAINING).write_text(yaml.safe_dump(training))
    return folder


@pytest.fixture(scope="module")
def job(objects: list[Object], here: Here) -> dict[str, Any]:
    """The RayJob on a cluster of its own; what Ray's jobs API says of it at its end."""
    cluster = Cluster(named(objects, "RayJob", "finetune"), objects, here, secrets.token_hex(32))
    with cluster.pods():
        submitted = cluster.submit("finetune-fghij", JOB_SECONDS)
        with httpx.Client(
            base_url=cluster.dashboard, headers=cluster.authorization, timeout=60
        ) as client:
            info = client.get("/api/jobs/finetune-fghij").raise_for_status().json()
            logs = client.get("/api/jobs/finetune-fghij/logs").json()["logs"]
    (here.folder / "job.log").write_text(f"{info}\n{logs}")
    return {**info, "logs": logs, "submitter": submitted}


@dataclass
class Serving:
    cluster: Cluster
    head: Pod
    workers: list[Pod]
    address: str
    config: Object

    def applications(self) -> dict[str, Any]:
        reply = httpx.get(
            f"{self.cluster.dashboard}/api/serve/applications/",
            headers=self.cluster.authorization,
            timeout=30,
        )
        return reply.raise_for_status().json()["applications"]

    def wait_until_running(self) -> dict[str, Any]:
        deadline = time.monotonic() + DEPLOY_SECONDS
        while True:
            applications = self.applications()
            states = [each["status"] for each in applications.values()]
            if states == ["RUNNING"] * len(self.config["applications"]):
                return applications
            assert time.monotonic() < deadline, applications
            time.sleep(0.3)


@pytest.fixture(scope="module")
def serving(objects: list[Object], here: Here, s3_server: LocalS3) -> Iterator[Serving]:
    """The RayService: its cluster, and its Serve config sent to it as the operator does."""
    service = named(objects, "RayService", "gptj")
    config = here.serve_config(service["spec"]["serveConfigV2"])
    save_models(config, s3_server)
    cluster = Cluster(service, objects, here, secrets.token_hex(32))
    with cluster.pods() as (head, workers):
        reply = httpx.put(
            f"{cluster.dashboard}/api/serve/applications/",
            json=config,
            headers=cluster.authorization,
            timeout=120,
        )
        assert reply.status_code == 200, reply.text
        found = Serving(cluster, head, workers, f"http://{HOST}:{here.serve_port}", config)
        found.wait_until_running()
        yield found


def save_models(config: Object, s3: LocalS3) -> None:
    """Those that the overlay trains, where the Serve config looks for them."""
    models = make_models()
    addresses = {each["name"]: each["args"]["checkpoint"] for each in config["applications"]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        for name, model in (
            ("generation", models.with_unused_ids()),
            ("classification", models.classification),
            ("question-answering", models.question_answering),
        ):
            if not storage.exists(storage.join(addresses[name], manifest.MANIFEST)):  # trained
                model.save_pretrained(addresses[name], tokenizer=models.tokenizer)


@pytest.mark.nightly
def test_the_training_job_succeeds_and_leaves_the_model_that_is_served(
    objects: list[Object], here: Here, job: dict[str, Any], s3: LocalS3
) -> None:
    assert (job["submitter"], job["status"]) == (0, "SUCCEEDED"), job["logs"]
    config = here.serve_config(named(objects, "RayService", "gptj")["spec"]["serveConfigV2"])
    (address,) = (
        each["args"]["checkpoint"]
        for each in config["applications"]
        if each["name"] == "generation"
    )
    manifest.verify(address)


def test_the_serve_service_routes_to_the_workers(serving: Serving) -> None:
    assert serving.cluster.served_by([serving.head, *serving.workers]) == serving.workers


def test_each_service_answers_with_a_key(serving: Serving) -> None:
    requests = {
        "/v1/completions": {"prompt": "The function", "max_tokens": 4},
        "/classification": {"inputs": "The tower stands in Paris."},
        "/question-answering": {"inputs": {"question": "Where?", "context": "It is in Rome."}},
    }
    for route, body in requests.items():
        url = f"{serving.address}{route}"
        assert httpx.post(url, json=body, timeout=60, follow_redirects=True).status_code == 401
        keyed = httpx.post(
            url,
            json=body,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
            follow_redirects=True,
        )
        assert keyed.status_code == 200, keyed.text
    assert httpx.get(f"{serving.address}/health", timeout=30).status_code == 200


def test_the_dashboard_requires_the_token(serving: Serving) -> None:
    for path in ("/api/jobs/", "/api/serve/applications/", "/nodes?view=summary"):
        reply = httpx.get(f"{serving.cluster.dashboard}{path}", timeout=30)
        assert reply.status_code in (401, 403), path


@pytest.mark.parametrize("kind", ["readinessProbe", "livenessProbe"])
def test_the_probes_answer_without_a_token(serving: Serving, kind: str) -> None:
    for pod in (serving.head, *serving.workers):
        assert pod.probe(kind) == 200, (pod.name, kind)


def test_prometheus_finds_all_metrics_of_rules_and_dashboards(serving: Serving) -> None:
    """But for what trainings report, which tests/cluster/test_finetune_job.py looks at."""
    expressions = [
        *(each for each in k8s_metrics.rules() if "Training" not in each.place),
        *k8s_metrics.panels("serving"),
        *k8s_metrics.panels("engine"),
    ]
    seen: dict[str, set[str]] = {}
    deadline = time.monotonic() + METRICS_SECONDS
    while True:
        for pod in (serving.head, *serving.workers):
            text = httpx.get(f"http://{pod.ip}:{pod.ports.metrics}/metrics", timeout=30).text
            for name, labels in k8s_metrics.exported(text).items():
                seen.setdefault(name, set()).update(labels)
        faults = k8s_metrics.missing(seen, expressions, uncounted=UNCOUNTED)
        if not faults:
            return
        assert time.monotonic() < deadline, "\n".join(faults)
        time.sleep(1)


@pytest.mark.nightly  # the next test shows it too, by a head that exits by itself
def test_deployments_and_requests_survive_losing_the_head(serving: Serving) -> None:
    before = replicas(serving.applications())
    with asking(serving) as replies:
        wait_for_more(replies)
        serving.head.kill()
        assert not psutil.pid_exists(serving.head.process.pid)
        wait_for_more(replies)  # with no head at all
        serving.head = serving.cluster.start_head()
        serving.cluster.wait_for_nodes(1 + len(serving.workers))
        after = replicas(serving.wait_until_running())
        wait_for_more(replies)
    assert set(replies.seen) == {200}
    assert after == before, "replicas were started anew"


def test_a_new_redis_password_only_needs_a_restart_of_redis(
    serving: Serving, redis: Redis, here: Here
) -> None:
    """The head ends by itself, and its successor has the new one, by the secret."""
    before = replicas(serving.applications())
    with asking(serving) as replies:
        wait_for_more(replies)  # so that the connection is a worker's, not the ending head's
        redis.start(secrets.token_hex(16))
        here.secrets["redis", "password"] = redis.password
        serving.head.process.wait(timeout=60)
        serving.head.kill()  # what it left
        wait_for_more(replies)
        serving.head = serving.cluster.start_head()
        serving.cluster.wait_for_nodes(1 + len(serving.workers))
        after = replicas(serving.wait_until_running())
        wait_for_more(replies)
    assert set(replies.seen) == {200}
    assert after == before, "replicas were started anew"


def replicas(applications: dict[str, Any]) -> dict[str, list[str]]:
    """The ids of the running replicas by application."""
    return {
        name: sorted(
            replica["replica_id"]
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        )
        for name, application in applications.items()
    }


@dataclass
class Replies:
    seen: list[int | str] = field(default_factory=list)


def wait_for_more(replies: Replies, count: int = 5) -> None:
    before = len(replies.seen)
    deadline = time.monotonic() + 60
    while len(replies.seen) < before + count:
        assert time.monotonic() < deadline, "no replies come any more"
        time.sleep(0.05)


@contextmanager
def asking(serving: Serving) -> Iterator[Replies]:
    """One request after another to a worker's proxy, as the service sends none to the head."""
    replies, end = Replies(), threading.Event()

    def ask() -> None:
        body = {"prompt": "The function", "max_tokens": 4}
        headers = {"Authorization": f"Bearer {KEY}"}
        with worker_connection(serving) as client:
            while not end.is_set():
                try:
                    reply = client.post("/v1/completions", json=body, headers=headers)
                    replies.seen.append(reply.status_code)
                except httpx.TransportError as error:
                    replies.seen.append(repr(error))
                time.sleep(0.1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield replies
    finally:
        end.set()
        thread.join()


@contextmanager
def worker_connection(serving: Serving) -> Iterator[httpx.Client]:
    """A client whose one connection was taken by a proxy of a worker.

    All proxies listen on one port here, and the kernel chooses; in the cluster the service does,
    which leaves out the head.
    """
    workers = {process.pid for pod in serving.workers for process in pod.processes()}
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    for _ in range(50):
        client = httpx.Client(base_url=serving.address, timeout=60, limits=limits)
        with client:
            stream = client.get("/-/healthz").extensions["network_stream"]
            _, port = stream.get_extra_info("client_addr")
            ends = {
                each.pid
                for each in psutil.net_connections("tcp4")
                if each.raddr and each.raddr.port == port
            }
            if ends & workers:
                yield client
                return
    raise AssertionError("no proxy of a worker took a connection")
