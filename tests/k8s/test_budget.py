"""The disruption budget that each cluster's head applies for its own workers."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kuberay_operator
import kubernetes_validate
import pytest
import requests
from manifests import Object, of_kind, selects

from deployments.budget import Kubernetes, apply

pytestmark = pytest.mark.slow  # kubectl builds the manifests

CLUSTER = "gptj-abcde"
TOKEN = "a-token-of-the-account"


@dataclass
class ApiServer:
    """What the module needs of Kubernetes' API: one RayCluster, and budgets that are applied."""

    refusals: list[int] = field(default_factory=list)  # statuses of the next replies
    budgets: dict[str, Any] = field(default_factory=dict)
    deleting: dict[str, str] = field(default_factory=dict)  # of the cluster's metadata
    address: str = ""

    def handle(self, request: BaseHTTPRequestHandler) -> tuple[int, Any]:
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"message": "Unauthorized"}
        if self.refusals:
            return self.refusals.pop(0), {"message": "refused"}
        path, _, query = request.path.partition("?")
        if (request.command, path) == (
            "GET",
            f"/apis/ray.io/v1/namespaces/gptj/rayclusters/{CLUSTER}",
        ):
            return 200, {"metadata": {"name": CLUSTER, "uid": "the-uid", **self.deleting}}
        folder = "/apis/policy/v1/namespaces/gptj/poddisruptionbudgets/"
        if request.command == "PATCH" and path.startswith(folder):
            assert query == "fieldManager=gptj&force=true"
            assert request.headers["Content-Type"] == "application/apply-patch+yaml"
            body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            assert body["metadata"]["name"] == path.removeprefix(folder)
            self.budgets[body["metadata"]["name"]] = body
            return 201, body
        return 404, {"message": f"{path} not found"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """Over TLS, with an authority of its own, as in a cluster."""
    authority, key = tmp_path / "ca.crt", tmp_path / "key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=api"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    subprocess.run([*command, "-out", str(authority)], check=True, capture_output=True)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("gptj")
    found = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = found.handle(self)
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_PATCH = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    found.address = f"https://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield found
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_budget_covers_this_clusters_workers_and_is_deleted_with_it(
    server: ApiServer, tmp_path: Path, objects: list[Object]
) -> None:
    done = apply(Kubernetes(server.address, tmp_path), CLUSTER, 1)
    assert done == f"{CLUSTER}-workers keeps 1"
    budget = server.budgets[f"{CLUSTER}-workers"]
    kubernetes_validate.validate(budget, "1.33", strict=True)
    (owner,) = budget["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("RayCluster", CLUSTER, "the-uid")
    assert budget["spec"]["minAvailable"] == 1
    (service,) = of_kind(objects, "RayService")
    for suffix, counts in (("abcde", True), ("other", False)):
        cluster = kuberay_operator.ray_cluster(service, suffix)
        (group,) = cluster["spec"]["workerGroupSpecs"]
        worker = kuberay_operator.worker_pod(cluster, group)
        head = kuberay_operator.head_pod(cluster)
        assert selects(budget["spec"]["selector"], worker["metadata"]["labels"]) is counts
        assert not selects(budget["spec"]["selector"], head["metadata"]["labels"])


def test_a_cluster_being_deleted_gets_no_budget(server: ApiServer, tmp_path: Path) -> None:
    server.deleting = {"deletionTimestamp": "2026-11-26T08:00:00Z"}
    assert "being deleted" in apply(Kubernetes(server.address, tmp_path), CLUSTER, 1)
    assert not server.budgets


def test_requests_to_a_busy_server_are_retried(server: ApiServer, tmp_path: Path) -> None:
    server.refusals = [503, 429]
    apply(Kubernetes(server.address, tmp_path), CLUSTER, 1)
    assert server.budgets


def test_a_refusal_fails_at_once_with_the_servers_message(
    server: ApiServer, tmp_path: Path
) -> None:
    kubernetes = Kubernetes(server.address, tmp_path)
    server.refusals = [403]
    with pytest.raises(requests.HTTPError, match=f"rayclusters/{CLUSTER}: 403 .*refused"):
        apply(kubernetes, CLUSTER, 1)
    with pytest.raises(requests.HTTPError, match="rayclusters/gone: 404"):
        apply(kubernetes, "gone", 1)
    server.refusals = [503] * 9
    with pytest.raises(requests.RequestException, match="503"):
        apply(Kubernetes(server.address, tmp_path, try_seconds=0), CLUSTER, 1)
    assert not server.budgets


def test_outside_a_pod_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "deployments.budget", CLUSTER], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no disruption budget for {CLUSTER}: KUBERNETES_")


def test_the_head_has_exactly_the_rights_it_needs(objects: list[Object]) -> None:
    """And it asks before it starts, by its cluster's name."""
    (role,) = of_kind(objects, "Role")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get"]},
        {
            "apiGroups": ["policy"],
            "resources": ["poddisruptionbudgets"],
            "verbs": ["create", "patch"],
        },
    ]
    (binding,) = of_kind(objects, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (service,) = of_kind(objects, "RayService")
    pod = kuberay_operator.head_pod(kuberay_operator.ray_cluster(service, "abcde"))["spec"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (pod["serviceAccountName"], "gptj")
    (container,) = pod["initContainers"]
    assert container["command"][:4] == ["python", "-m", "deployments.budget", "$(CLUSTER)"]
    assert container["env"][0]["valueFrom"] == kuberay_operator.label("ray.io/cluster")
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert int(container["command"][-1]) < workers["minReplicas"]
