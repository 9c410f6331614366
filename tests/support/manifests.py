"""The manifests of k8s/, as kustomize builds them, and ways to find things in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import kuberay_operator
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

Object = dict[str, Any]


def program() -> list[str]:
    """kubectl of our environment, or what the machine has."""
    for path in (Path(sys.executable).parent / "kubectl", shutil.which("kubectl")):
        if path is not None and Path(path).exists():
            return [str(path), "kustomize"]
    if found := shutil.which("kustomize"):
        return [found, "build"]
    pytest.skip("neither kubectl nor kustomize is here")


# Which kustomization a component is for, where it is not serving's alone.
COMPONENTS_OF = {
    "irsa": ("overlays", "training/overlays"),
    "kueue": ("training/overlays",),
    "spot": ("training/overlays",),
    "node-local-dns": ("namespace",),
    "cilium": ("overlays",),
}


def build(name: str) -> list[Object]:
    """All that a cluster gets: the namespace's objects, serving's and training's.

    Args:
        name: an overlay, and with "+" before each, components that are added to it.
    """
    overlay, *components = name.split("+")
    folders = {
        "namespace": K8S / "namespace",
        "overlays": K8S / "overlays" / overlay,
        # Cards differ for serving only.
        "training/overlays": K8S / "training" / "overlays" / overlay.partition("-")[0],
    }
    return [
        each
        for part, folder in folders.items()
        for each in kustomize(
            folder, [each for each in components if part in COMPONENTS_OF.get(each, ("overlays",))]
        )
    ]


def kustomize(folder: Path, components: Sequence[str] = ()) -> list[Object]:
    """The objects of one kustomization, with components of k8s/components added."""
    return list(yaml.load_all(_built(folder, tuple(components)), yaml.CSafeLoader))


@cache
def _built(folder: Path, components: tuple[str, ...]) -> str:
    """What kubectl prints: a second or two of it for each."""
    with tempfile.TemporaryDirectory() as scratch:
        if components:
            kustomization = {
                "resources": [os.path.relpath(folder, scratch)],
                "components": [
                    os.path.relpath(K8S / "components" / each, scratch) for each in components
                ],
                "namespace": "gptj",
            }
            (Path(scratch) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            folder = Path(scratch)
        done = subprocess.run(
            [*program(), str(folder)], capture_output=True, text=True, timeout=300
        )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def clusters(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each RayService and RayJob with its RayCluster's specification."""
    for each in of_kind(objects, "RayService"):
        yield each, each["spec"]["rayClusterConfig"]
    for each in of_kind(objects, "RayJob"):
        yield each, each["spec"]["rayClusterSpec"]


def made_clusters(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each RayService and RayJob with the RayCluster that KubeRay makes of it."""
    for owner in of_kind(objects, "RayService", "RayJob"):
        yield owner, kuberay_operator.ray_cluster(owner, "abcde")


def templates(objects: list[Object]) -> Iterator[Object]:
    """All pods that run in the namespace: Ray's as KubeRay builds them."""
    for owner, cluster in made_clusters(objects):
        yield kuberay_operator.head_pod(cluster)
        for group in cluster["spec"]["workerGroupSpecs"]:
            yield kuberay_operator.worker_pod(cluster, group)
        if owner["kind"] == "RayJob":
            yield kuberay_operator.submitter(owner, cluster, "finetune-fghij")["spec"]["template"]
        if "gcsFaultToleranceOptions" in cluster["spec"]:
            yield kuberay_operator.redis_cleanup(cluster)["spec"]["template"]
    for each in of_kind(objects, "StatefulSet"):
        yield each["spec"]["template"]


def component(template: Object) -> str:
    return template["metadata"]["labels"]["app.kubernetes.io/component"]


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    for template in templates(objects):
        for kind in ("initContainers", "containers"):
            for container in template["spec"].get(kind, []):
                yield template, container


@cache
def secrets(overlay: str) -> dict[str, set[str]]:
    """What k8s/secrets.sh makes, with its keys."""
    keys = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-key"}
    done = subprocess.run(
        [str(K8S / "secrets.sh"), overlay],
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        check=True,
    )
    made = list(yaml.safe_load_all(done.stdout))
    for secret in made:
        kubernetes_validate.validate(secret, kubernetes_validate.latest_version(), strict=True)
        assert secret["metadata"]["namespace"] == "gptj"
        values = {**secret.get("stringData", {}), **secret.get("data", {})}
        assert all(len(value) >= 16 or value in keys.values() for value in values.values())
    return {
        each["metadata"]["name"]: {*each.get("stringData", {}), *each.get("data", {})}
        for each in made
    }


def selects(selector: Object, labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True
