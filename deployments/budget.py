"""A disruption budget for the workers of one Ray cluster; Serve's head runs it before it starts.

    python -m deployments.budget CLUSTER [--keep 1]

Clusters have random names, so a budget in a manifest would cover all clusters' workers: in an
upgrade the old cluster's would satisfy it while all of the new one's are evicted. So each cluster's
head applies its own, and Kubernetes deletes it with the RayCluster. The pod's account needs to get
`rayclusters` and to create and patch `poddisruptionbudgets`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TRY_SECONDS = 60.0
REQUEST_SECONDS = 10.0


@dataclass(frozen=True)
class Kubernetes:
    """The API server, through a pod's service account."""

    address: str
    account: Path = ACCOUNT
    try_seconds: float = TRY_SECONDS  # of retries while the server does not answer, or is busy

    @classmethod
    def of_this_pod(cls) -> Kubernetes:
        """Raises LookupError outside a pod."""
        if "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise LookupError("KUBERNETES_SERVICE_HOST is not set: this only runs in a pod")
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")

    @property
    def namespace(self) -> str:
        return (self.account / "namespace").read_text()

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The reply's object.

        Raises requests.RequestException if there is none, with the server's message.
        """
        end = time.monotonic() + self.try_seconds
        while True:
            try:
                return self._ask_once(method, path, **body)
            except (requests.ConnectionError, requests.Timeout, Busy) as error:
                if time.monotonic() > end:
                    raise
                print(f"retrying in a second: {error}", file=sys.stderr, flush=True)
                time.sleep(1)

    def _ask_once(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        reply = requests.request(
            method,
            f"{self.address}{path}",
            headers={
                "Authorization": f"Bearer {(self.account / 'token').read_text()}",
                "Content-Type": "application/apply-patch+yaml",
            },
            verify=str(self.account / "ca.crt"),
            timeout=REQUEST_SECONDS,
            **body,
        )
        if reply.status_code == 429 or reply.status_code >= 500:
            raise Busy(f"{method} {path}: {reply.status_code} {reply.text}")
        if not reply.ok:
            raise requests.HTTPError(f"{method} {path}: {reply.status_code} {reply.text}")
        answer: dict[str, Any] = reply.json()
        return answer


class Busy(requests.RequestException):
    """The API server is temporarily unavailable."""


def apply(kubernetes: Kubernetes, cluster: str, keep: int) -> str:
    """Create or update the budget that keeps `keep` workers; returns a line that says so.

    A cluster that is being deleted needs none: KubeRay then runs the head's pod once more, to clear
    its state in Redis.
    """
    inside = f"namespaces/{kubernetes.namespace}"
    owner = kubernetes.ask("GET", f"/apis/ray.io/v1/{inside}/rayclusters/{cluster}")
    if owner["metadata"].get("deletionTimestamp"):
        return f"{cluster} is being deleted"
    name = f"{cluster}-workers"
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/part-of": "gptj"},
            "ownerReferences": [
                {
                    "apiVersion": "ray.io/v1",
                    "kind": "RayCluster",
                    "name": cluster,
                    "uid": owner["metadata"]["uid"],
                }
            ],
        },
        "spec": {
            "minAvailable": keep,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",  # unhealthy pods do not block draining
            "selector": {"matchLabels": {"ray.io/cluster": cluster, "ray.io/node-type": "worker"}},
        },
    }
    path = f"/apis/policy/v1/{inside}/poddisruptionbudgets/{name}?fieldManager=gptj&force=true"
    kubernetes.ask("PATCH", path, json=budget)
    return f"{name} keeps {keep}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Apply a disruption budget for a cluster's workers."
    )
    parser.add_argument("cluster", help="the RayCluster's name")
    parser.add_argument("--keep", type=int, default=1, help="workers that are never evicted")
    arguments = parser.parse_args()
    try:
        done = apply(Kubernetes.of_this_pod(), arguments.cluster, arguments.keep)
    except (LookupError, requests.RequestException) as error:
        sys.exit(f"error: no disruption budget for {arguments.cluster}: {error}")
    print(done, flush=True)


if __name__ == "__main__":
    main()
