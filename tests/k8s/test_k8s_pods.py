"""The services, pods and jobs that KubeRay builds of the manifests, and what was wrong with them.

On a real cluster; each test fails for the manifests as they were then.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import kuberay_operator as operator
import pytest
import yaml
from kuberay_operator import quantity
from manifests import K8S, Object, kustomize, made_clusters, named, of_kind, selects, templates

pytestmark = pytest.mark.slow  # kubectl builds the manifests

OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
TRAININGS = sorted(
    path.parent for path in (K8S / "training" / "overlays").glob("*/kustomization.yaml")
)


def services(objects: list[Object]) -> Iterator[Object]:
    yield from of_kind(objects, "Service")
    for owner, cluster in made_clusters(objects):
        yield operator.head_service(cluster)
        yield operator.head_service(cluster, owner)
        if owner["kind"] == "RayService":
            yield operator.serve_service(owner, cluster)


def test_the_serve_service_has_the_heads_ports_and_selects_workers(
    objects: list[Object],
) -> None:
    (owner,) = of_kind(objects, "RayService")
    cluster = operator.ray_cluster(owner, "abcde")
    service = operator.serve_service(owner, cluster)
    config = yaml.safe_load(owner["spec"]["serveConfigV2"])
    assert service["spec"]["ports"] == [{"name": "serve", "port": config["http_options"]["port"]}]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    selector = {"matchLabels": service["spec"]["selector"]}
    assert selects(selector, operator.worker_pod(cluster, group)["metadata"]["labels"])
    assert not selects(selector, operator.head_pod(cluster)["metadata"]["labels"])
    (ingress,) = of_kind(objects, "Ingress")
    for path in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    ports = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    ports[:] = [each for each in ports if each["name"] != "serve"]
    with pytest.raises(operator.Refused):
        operator.serve_service(owner, cluster)


def test_no_pod_has_service_links(objects: list[Object]) -> None:
    for pod in templates(objects):
        assert pod["spec"]["enableServiceLinks"] is False, pod["metadata"]["labels"]


def test_no_service_name_collides_with_the_s3_servers_variables(
    objects: list[Object], tmp_path: Path
) -> None:
    """For a pod with service links: SeaweedFS takes its flags from variables, too."""
    weed = Path(sys.executable).parent / "weed"
    usage = subprocess.run([weed, "help", "mini"], capture_output=True, text=True)
    flags = re.findall(r"^\s+-([\w.]+)", usage.stdout + usage.stderr, re.M)
    variables = {flag.upper().replace(".", "_") for flag in flags}
    assert "S3_PORT" in variables
    for service in services(objects):
        prefix = service["metadata"]["name"].upper().replace("-", "_")
        made = {f"{prefix}_PORT", f"{prefix}_SERVICE_HOST", f"{prefix}_SERVICE_PORT"}
        assert not made & variables, service["metadata"]["name"]
    refused = subprocess.run(
        [weed, "mini", f"-dir={tmp_path}"],
        env={"S3_PORT": "tcp://10.96.10.10:8333"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "environment variable s3.port" in refused.stderr


def test_the_autoscaler_writes_its_logs_where_the_head_looks(objects: list[Object]) -> None:
    (owner,) = of_kind(objects, "RayService")
    pod = operator.head_pod(operator.ray_cluster(owner, "abcde"))["spec"]
    volumes = []
    for name in ("ray-head", "autoscaler"):
        (container,) = [each for each in pod["containers"] if each["name"] == name]
        volumes += [m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/tmp/ray"]
    assert len(volumes) == 2 and len({*volumes}) == 1, volumes
    (volume,) = [each for each in pod["volumes"] if each["name"] == volumes[0]]
    assert volume["emptyDir"]["sizeLimit"]


def test_the_object_store_fits_into_shared_memory(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Decided by Ray itself, with the volume's size; and as much is left for others."""
    from ray._private import services as ray_services
    from ray._private import utils as ray_utils

    checked = 0
    for pod in templates(objects):
        ray = pod["spec"]["containers"][0]
        found = re.search(r"ray start .*", str(ray.get("args")))
        if not found or "ray job submit" in str(ray["args"]):
            continue
        (store,) = re.findall(r"--object-store-memory=(\d+) ", found[0])
        (mount,) = [each for each in ray["volumeMounts"] if each["mountPath"] == "/dev/shm"]
        (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
        size = int(quantity(volume["emptyDir"]["sizeLimit"]))
        monkeypatch.setattr(ray_utils, "get_shared_memory_bytes", lambda size=size: size)
        where, _, _ = ray_services.determine_plasma_store_config(int(store), str(tmp_path))
        assert where == "/dev/shm", pod["metadata"]["labels"]
        assert 2 * int(store) <= size
        assert size < quantity(ray["resources"]["limits"]["memory"])
        checked += 1
    assert checked == 4


def test_pods_of_ray_are_never_restarted_by_the_kubelet(objects: list[Object]) -> None:
    """KubeRay makes new ones; with autoscaler v2 it sees to it, for trainings we do."""
    for pod in templates(objects):
        if pod["metadata"]["labels"].get("ray.io/is-ray-node"):
            assert pod["spec"]["restartPolicy"] == "Never"


def test_the_submitter_retries_without_submitting_a_job_twice(objects: list[Object]) -> None:
    (owner,) = of_kind(objects, "RayJob")
    job = operator.submitter(owner, operator.ray_cluster(owner, "abcde"), "finetune-fghij")
    assert job["spec"]["backoffLimit"] == 2
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (text,) = container["args"]
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0
    assert text.index("ray job status") < text.index("ray job submit") < text.index("ray job logs")
    # The network policies let it reach what it submits to.
    (port,) = {
        *re.findall(r"http://finetune-abcde-head-svc\.gptj\.svc\.cluster\.local:(\d+)", text)
    }
    policy = named(objects, "NetworkPolicy", "submitter")["spec"]
    assert policy["egress"][0]["ports"] == [{"port": int(port), "protocol": "TCP"}]
    assert selects(policy["podSelector"], job["spec"]["template"]["metadata"]["labels"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_no_pod_of_a_training_is_evicted(objects: list[Object], kind: str) -> None:
    """More of them have to stay than there are."""
    (owner,) = of_kind(objects, "RayJob")
    cluster = operator.ray_cluster(owner, "abcde")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    pod = operator.head_pod(cluster) if kind == "head" else operator.worker_pod(cluster, group)
    (budget,) = [
        each["spec"]
        for each in of_kind(objects, "PodDisruptionBudget")
        if selects(each["spec"]["selector"], pod["metadata"]["labels"])
    ]
    assert budget["minAvailable"] > 100 * (1 + group["maxReplicas"])
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_no_budget_spans_the_workers_of_several_clusters(objects: list[Object]) -> None:
    """deployments/budget.py makes one for each; a pod may be under one budget only."""
    (owner,) = of_kind(objects, "RayService")
    cluster = operator.ray_cluster(owner, "abcde")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    labels = operator.worker_pod(cluster, group)["metadata"]["labels"]
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert not selects(budget["spec"]["selector"], labels)


def test_only_kueue_suspends_a_training(objects: list[Object]) -> None:
    """`kubectl apply` leaves alone what the manifest does not name."""
    (job,) = of_kind(objects, "RayJob")
    assert "suspend" not in job["spec"]
    if of_kind(objects, "LocalQueue"):
        (queue,) = of_kind(objects, "LocalQueue")
        name = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert name == queue["metadata"]["name"]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_applying_serving_starts_no_training(folder: Path) -> None:
    serving = kustomize(folder)
    assert of_kind(serving, "RayService")
    assert not of_kind(serving, "RayJob")
    for each in serving:
        assert each["metadata"]["name"] not in ("training", "finetune")


@pytest.mark.parametrize("folder", TRAININGS, ids=lambda path: path.name)
def test_deleting_a_training_leaves_serving_and_the_namespace(folder: Path) -> None:
    """And the other way round: no object is in two kustomizations."""
    training = kustomize(folder)
    assert of_kind(training, "RayJob")
    assert not of_kind(training, "RayService")
    keys = {(each["kind"], each["metadata"]["name"]) for each in training}
    for other in (K8S / "namespace", *OVERLAYS):
        theirs = {(each["kind"], each["metadata"]["name"]) for each in kustomize(other)}
        assert not keys & theirs
        keys |= theirs if other == K8S / "namespace" else set()


def test_the_readme_says_what_causes_a_new_cluster(objects: list[Object]) -> None:
    (owner,) = of_kind(objects, "RayService")
    before = operator.compared(owner)

    def changed(path: str, value: object) -> bool:
        after = deepcopy(owner)
        *way, last = path.split("/")
        where = after["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
        for key in way:
            where = where[int(key) if key.isdigit() else key]
        where[last] = value
        return operator.compared(after) != before

    assert changed("template/spec/containers/0/image", "another:1")
    assert changed("template/spec/nodeSelector", {"a": "b"})
    assert not changed("template/spec/tolerations", [{"key": "a", "operator": "Exists"}])
    assert not changed("minReplicas", 3)
    assert not changed("maxReplicas", 9)


def test_priority_classes_are_below_their_dependencies(objects: list[Object]) -> None:
    """The README installs the operator with a class of Kubernetes' own, whose value this is."""
    system_cluster_critical = 2_000_000_000
    for each in of_kind(objects, "PriorityClass"):
        assert each["value"] < system_cluster_critical
    assert "--set priorityClassName=system-cluster-critical" in (K8S / "README.md").read_text()
