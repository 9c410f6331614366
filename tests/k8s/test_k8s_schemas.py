"""The manifests against the schemas and rules of those who read them."""

from __future__ import annotations

import json
import re
from functools import cache

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import (
    K8S,
    PROJECT,
    ROOT,
    Object,
    clusters,
    of_kind,
    selects,
    templates,
)

pytestmark = pytest.mark.slow  # kubectl builds the manifests

CRDS = ROOT.parent / "shared" / "kuberay"
CUSTOM = {
    *("RayService", "RayJob", "PodMonitor", "PrometheusRule", "LocalQueue", "CiliumNetworkPolicy"),
}
CLUSTER_WIDE = {"Namespace", "PriorityClass"}


def test_each_object_matches_kubernetes_schemas(objects: list[Object]) -> None:
    """Strictly: an unknown field is a fault. The latest version, and the oldest that we support."""
    for each in objects:
        if each["kind"] not in CUSTOM:
            for version in ("1.33", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(each, version, strict=True)


@cache
def crd(kind: str) -> Object:
    """KubeRay's schema of a kind, closed: no field but those it names."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's definitions are not at {CRDS}: they are no part of the project")
    document = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [each for each in document["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    close(schema)
    return schema


def close(schema: Object) -> None:
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    properties = schema.get("properties", {})
    if properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    # The server fills defaults in before it looks for what is required.
    if "required" in schema:
        schema["required"] = [
            name for name in schema["required"] if "default" not in properties.get(name, {})
        ]
    for value in properties.values():
        close(value)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            close(schema[key])


@pytest.mark.parametrize("kind", ["RayService", "RayJob"])
def test_each_ray_object_matches_kuberays_schema(objects: list[Object], kind: str) -> None:
    schema = crd(kind)
    (found,) = of_kind(objects, kind)
    checked = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    jsonschema.Draft202012Validator(checked).validate(found)
    # The checker itself refuses what it should.
    wrong = json.loads(json.dumps(found))
    wrong["spec"]["rayClusterConfg"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayClusterConfg"):
        jsonschema.Draft202012Validator(checked).validate(wrong)


def test_pod_templates_of_ray_objects_match_kubernetes_schemas(objects: list[Object]) -> None:
    for number, template in enumerate(templates(objects)):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": f"pod-{number}"},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


# Of kinds whose definitions are not on PyPI: the fields that we may use.
FIELDS = {
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "LocalQueue": {"clusterQueue"},
    "CiliumNetworkPolicy": {"endpointSelector", "egress"},
    "ClusterQueue": {"namespaceSelector", "queueingStrategy", "resourceGroups"},
    "ResourceFlavor": {"nodeLabels", "tolerations"},
}


def test_objects_of_other_operators_have_known_fields(objects: list[Object]) -> None:
    queues = (K8S / "components" / "kueue" / "cluster-queue.yaml").read_text()
    for each in [*objects, *yaml.safe_load_all(queues)]:
        if each["kind"] in FIELDS:
            assert set(each["spec"]) <= FIELDS[each["kind"]], each["kind"]
    for monitor in of_kind(objects, "PodMonitor"):
        ports = {
            port["name"]
            for template in templates(objects)
            if selects(monitor["spec"]["selector"], template["metadata"]["labels"])
            for port in template["spec"]["containers"][0]["ports"]
        }
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert set(endpoint) == {"port", "interval"}
            assert endpoint["port"] in ports
    for rule in of_kind(objects, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            assert set(group) == {"name", "rules"}
            for alert in group["rules"]:
                assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
                assert alert["labels"]["severity"] in ("warning", "critical")
                assert alert["expr"].count("(") == alert["expr"].count(")")
                assert alert["annotations"]["summary"]


def test_ray_objects_keep_the_operators_rules(objects: list[Object]) -> None:
    assert {each["kind"] for each, _ in clusters(objects)} == {"RayService", "RayJob"}
    for owner, cluster in clusters(objects):
        assert len(owner["metadata"]["name"]) <= 47
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", owner["metadata"]["name"])
        (pinned,) = (
            each for each in PROJECT["optional-dependencies"]["serve"] if each.startswith("ray[")
        )
        assert pinned.endswith("==" + cluster["rayVersion"])
        assert cluster["authOptions"] == {"mode": "token"}  # needs 2.52, which the pin is beyond
        for optional in ("networkPolicy", "tlsOptions", "historyServerOptions", "upgradeStrategy"):
            assert optional not in cluster, "alpha, or not for a cluster inside another object"
        assert cluster.get("gcsFaultToleranceOptions", {}).get("backend") != "rocksdb"
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            given = group["rayStartParams"]
            assert not (
                {"num-cpus", "num-gpus", "memory", "resources"} & given.keys()
                and group.get("resources")
            )
            assert "labels" not in given
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            assert policy == "Never"
            # KubeRay takes the first container for Ray's, and starts it itself.
            assert "command" not in group["template"]["spec"]["containers"][0]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert "headService" not in cluster["headGroupSpec"]
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if cluster.get("enableInTreeAutoscaling"):
            assert cluster["autoscalerOptions"]["version"] == "v2"
            assert not variables(cluster, "RAY_enable_autoscaler_v2")
        if "gcsFaultToleranceOptions" in cluster:
            assert not variables(cluster, "REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME")
            assert "redis-password" not in cluster["headGroupSpec"]["rayStartParams"]
            annotations = owner["metadata"].get("annotations", {})
            assert not [key for key in annotations if key.startswith("ray.io/")]
    (service,) = of_kind(objects, "RayService")
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    (job,) = of_kind(objects, "RayJob")
    assert "clusterSelector" not in job["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["ttlSecondsAfterFinished"]
    assert job["spec"]["backoffLimit"] >= 1
    assert job["spec"]["activeDeadlineSeconds"] > 0
    # It becomes a part of a shell's command line.
    assert not re.search(r"[&|;<>$`'\"\\]", job["spec"]["entrypoint"])


def variables(cluster: Object, *names: str) -> list[Object]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        variable
        for group in groups
        for container in group["template"]["spec"]["containers"]
        for variable in container.get("env", [])
        if variable["name"] in names
    ]


def test_names_and_labels_are_within_kubernetes_limits(objects: list[Object]) -> None:
    for each in objects:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])
        if each["kind"] in CLUSTER_WIDE:
            assert "namespace" not in each["metadata"]
        else:
            assert each["metadata"]["namespace"] == "gptj"
    keys = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(keys) == len(set(keys))
    for template in templates(objects):
        for value in template["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
        names = [
            port["name"] for c in template["spec"]["containers"] for port in c.get("ports", [])
        ]
        assert len(names) == len(set(names))
        assert all(len(name) <= 15 for name in names)
