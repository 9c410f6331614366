"""The RayService against serve.yaml."""

from __future__ import annotations

import importlib

import pytest
import yaml
from manifests import (
    K8S,
    Object,
    named,
    of_kind,
)

from gptj_local.ray import SERVE

pytestmark = pytest.mark.slow  # kubectl builds the manifests


def test_the_rayservice_has_serve_yaml_with_its_own_place(objects: list[Object]) -> None:
    """All but the block `place` is the file's; there the same settings, on all addresses."""
    (service,) = of_kind(objects, "RayService")
    text = service["spec"]["serveConfigV2"]
    file = (K8S / "base" / "serve.yaml").read_text()
    marker = "proxy_location:"
    assert text.count(marker) == file.count(marker) == 1
    assert text.partition(marker)[2] == file.partition(marker)[2]
    here, there = yaml.safe_load(text)["place"], yaml.safe_load(file)["place"]
    assert list(here) == list(there)
    assert there["host"] == "127.0.0.1"
    assert here["host"] == "0.0.0.0"


def test_serve_accepts_the_configuration_and_its_import_paths_exist(objects: list[Object]) -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(objects, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        module, _, name = application["import_path"].partition(":")
        built = getattr(importlib.import_module(module), name)(
            importlib.import_module(module).Arguments(**application["args"])
        )
        (deployment,) = application["deployments"]
        assert built._bound_deployment.name == deployment["name"]


def test_serve_has_the_settings_of_one_machine_and_our_middlewares(objects: list[Object]) -> None:
    (environment,) = [
        each["data"]
        for each in of_kind(objects, "ConfigMap")
        if each["metadata"]["name"].startswith("environment")
    ]
    assert {name: environment[name] for name in SERVE} == SERVE
    module, _, name = SERVE["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert getattr(importlib.import_module(module), name)()


def test_the_workers_fit_all_replicas_and_the_quota(
    objects: list[Object],
) -> None:
    (service,) = of_kind(objects, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    room = {"num_cpus": float(limits["cpu"]), "num_gpus": float(limits.get("nvidia.com/gpu", 0))}
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    deployments = [each["deployments"][0] for each in config["applications"]]
    for kind, count in room.items():
        for bound, replicas in (("minReplicas", "min_replicas"), ("maxReplicas", "max_replicas")):
            needed = sum(
                each["autoscaling_config"][replicas] * each["ray_actor_options"].get(kind, 0)
                for each in deployments
            )
            assert needed <= workers[bound] * count, (kind, bound)
    if room["num_gpus"]:
        assert all(each["ray_actor_options"]["num_gpus"] for each in deployments)
        (job,) = of_kind(objects, "RayJob")
        (trainers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        gpus = trainers["template"]["spec"]["containers"][0]["resources"]["limits"][
            "nvidia.com/gpu"
        ]
        quota = named(objects, "ResourceQuota", "gpus")["spec"]["hard"]["requests.nvidia.com/gpu"]
        serving = workers["maxReplicas"] * room["num_gpus"]
        # An upgrade has two clusters.
        assert 2 * serving + trainers["maxReplicas"] * float(gpus) <= float(quota)


def test_a_replica_that_hangs_is_noticed_within_fifteen_seconds(objects: list[Object]) -> None:
    """By three checks of Serve's without an answer, or of an engine that makes no step."""
    (service,) = of_kind(objects, "RayService")
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        (deployment,) = application["deployments"]
        period = 1.1 * deployment["health_check_period_s"]  # Serve adds up to a tenth
        timeout = deployment["health_check_timeout_s"]
        assert period + 3 * timeout <= 15
        assert application["args"]["stalled_seconds"] + 3 * period <= 15


# For a replica on a new machine: k8s/sizing.md's assumptions come to under nine minutes.
START_ELSEWHERE_SECONDS = 600


def test_nothing_ends_before_the_longest_request(objects: list[Object]) -> None:
    (service,) = of_kind(objects, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    longest = config["http_options"]["request_timeout_s"]
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "deployments.drain"]
    importlib.import_module("deployments.drain")
    drain = int(command[command.index("--seconds") + 1])
    assert longest < drain < pod["terminationGracePeriodSeconds"]
    assert longest < service["spec"]["rayClusterDeletionDelaySeconds"]
    for application in config["applications"]:
        (deployment,) = application["deployments"]
        graceful = deployment["graceful_shutdown_timeout_s"]
        assert longest <= graceful <= drain - START_ELSEWHERE_SECONDS
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
