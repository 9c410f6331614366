"""Overlays for other cards, and components that not everybody adds: built and checked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_k8s_references as references
import test_k8s_safety as safety
import test_k8s_schemas as schemas
import test_k8s_serve as serve
import yaml
from kuberay_operator import quantity
from manifests import K8S, Object, build, kustomize, named, of_kind, selects, templates
from ray.serve._private.utils import get_capacity_adjusted_num_replicas

from gptj import (
    GPTJConfig,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
)
from gptj.checkpoints.skeleton import without_weights
from gptj.engine import memory
from gptj.training import room
from gptj.training.settings import Settings, read_settings
from gptj_jobs import pre_stop
from gptj_local.ray import HAPROXY, SERVE

pytestmark = pytest.mark.slow  # kubectl builds the manifests

SIX_B = GPTJConfig.preset("6b")
TEAM = K8S / "team"
CARDS = {"gpu-16": 16, "gpu": 24, "gpu-40": 40, "gpu-80": 80}
COMPONENTS = ("shared-cache", "incremental-upgrade", "haproxy", "spot")


@pytest.fixture(scope="module")
def plain() -> list[Object]:
    """The overlay for 24 GB."""
    return build("gpu")


@pytest.fixture(scope="module", params=[*CARDS, *COMPONENTS])
def variant(request: pytest.FixtureRequest) -> Any:
    """An overlay for a card, or the one for 24 GB with a component; and its name."""
    name = request.param
    return name, build(name if name in CARDS else f"gpu+{name}")


def test_variants_match_the_schemas(variant: tuple[str, list[Object]], plain: list[Object]) -> None:
    """What differs from the overlay for 24 GB, which other tests check."""
    _, objects = variant
    schemas.test_ray_objects_keep_the_operators_rules(objects)
    schemas.test_names_and_labels_are_within_kubernetes_limits(objects)
    changed = [each for each in objects if each not in plain]
    schemas.test_each_object_matches_kubernetes_schemas(changed)
    schemas.test_pod_templates_of_ray_objects_match_kubernetes_schemas(changed)
    for each in of_kind(changed, "RayService", "RayJob"):
        schemas.test_each_ray_object_matches_kuberays_schema(changed, each["kind"])


def test_variants_are_as_safe(variant: tuple[str, list[Object]]) -> None:
    _, objects = variant
    safety.test_every_pod_passes_the_restricted_standard(objects)
    safety.test_manifests_contain_no_secrets(objects)
    safety.test_service_accounts_have_no_rights_and_no_token(objects)
    safety.test_only_the_needed_connections_are_allowed(objects)
    references.test_images_are_pinned_or_ours(objects)


def test_serve_accepts_variants(variant: tuple[str, list[Object]]) -> None:
    name, objects = variant
    serve.test_the_rayservice_has_serve_yaml_with_its_own_place(objects)
    serve.test_serve_accepts_the_configuration_and_its_import_paths_exist(objects)
    if name != "incremental-upgrade":  # its clusters start with one worker, and grow
        serve.test_the_workers_fit_all_replicas_and_the_quota(objects)


def test_haproxy_is_switched_on_and_its_program_is_in_the_image() -> None:
    (environment,) = [
        each["data"]
        for each in of_kind(build("gpu+haproxy"), "ConfigMap")
        if each["metadata"]["name"].startswith("environment")
    ]
    ours = {**SERVE, **HAPROXY}
    assert {name: environment[name] for name in ours} == ours
    copied = re.findall(r"^COPY (\w+) (/app/\S+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    program = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    (source,) = [source for source, target in copied if Path(target) in program.parents]
    assert os.access(K8S.parent / source / program.name, os.X_OK)


@pytest.mark.parametrize("overlay", ["gpu", "local"])
def test_a_training_that_is_told_to_stop_has_the_time_for_a_checkpoint(overlay: str) -> None:
    """Ray kills it after three seconds by default, and Kubernetes a pod after its grace."""
    objects = build(overlay)
    (job,) = of_kind(objects, "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (source,) = head["envFrom"]
    environment = named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    hook = head["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["python", "-m", pre_stop.__name__]
    scripts = [each["data"] for each in of_kind(objects, "ConfigMap")]
    assert f"{pre_stop.PROGRAM} " in f"{job['spec']['entrypoint']} {scripts}"
    (worker,) = cluster["workerGroupSpecs"]
    for group in (worker, cluster["headGroupSpec"]):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert 60 <= int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < grace


@pytest.mark.parametrize("overlay", CARDS)
def test_a_cards_settings_match_the_computed_ones(overlay: str) -> None:
    card = memory.CARDS[CARDS[overlay]]
    (service,) = of_kind(build(overlay), "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    applications = {each["name"]: each for each in config["applications"]}
    text = applications["generation"]
    fitting = memory.generation(SIX_B, card)
    assert text["args"]["cache_tokens"] == fitting.cache_tokens
    assert text["args"]["max_num_seqs"] == fitting.max_num_seqs
    scaling = text["deployments"][0]["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == min(12, round(fitting.max_num_seqs / 4))
    assert text["deployments"][0]["ray_actor_options"]["num_gpus"] == 1
    for name, head, most in (
        ("classification", GPTJForSequenceClassification, 32),
        ("question-answering", GPTJForQuestionAnswering, 16),
    ):
        rows = memory.batch_sizes(head, SIX_B, card, most)
        assert applications[name]["args"]["max_batch"] == rows.max_batch
        gpus = applications[name]["deployments"][0]["ray_actor_options"]["num_gpus"]
        assert gpus == 1 / rows.replicas_per_card
    assert {each["args"]["dtype"] for each in applications.values()} == {"float16"}
    # The pod's own memory: its processes, and all of /dev/shm.
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    replicas = max(
        int(1 / each["deployments"][0]["ray_actor_options"]["num_gpus"])
        for each in applications.values()
    )
    (shared,) = [v for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
    needed = memory.host_bytes(replicas) + quantity(shared["emptyDir"]["sizeLimit"])
    assert quantity(pod["containers"][0]["resources"]["requests"]["memory"]) >= needed


def test_the_documented_table_of_cards_matches_the_computed_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory.main()
    assert capsys.readouterr().out in (K8S / "sizing.md").read_text()


def test_the_checkpoint_cache_fits_on_its_volume(
    variant: tuple[str, list[Object]],
) -> None:
    """In every pod that loads models, and on a claim that outlives pods where that is added."""
    name, objects = variant
    (service,) = of_kind(objects, "RayService")
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    container = pod["containers"][0]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    (mount,) = [
        each
        for each in container["volumeMounts"]
        if each["mountPath"] == variables["GPTJ_CACHE_FOLDER"]
    ]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    limit = float(variables["GPTJ_CACHE_GB"]) * 1e9
    model = memory.weight_bytes(GPTJForSequenceClassification, SIX_B)
    if name == "shared-cache":
        claim = volume["persistentVolumeClaim"]["claimName"]
        spec = named(objects, "PersistentVolumeClaim", claim)["spec"]
        assert spec["accessModes"] == ["ReadWriteMany"]  # of several nodes' pods
        assert limit < quantity(spec["resources"]["requests"]["storage"])
        assert limit >= 6 * model  # three models, and those that come after them
    else:
        assert limit < quantity(volume["emptyDir"]["sizeLimit"])
        assert limit >= 3 * model


EXAMPLES = 40e9  # bytes: those of ten billion tokens
FROM_A_HUB = 24.3e9  # bytes of a 6B model in fp32


def test_a_model_from_a_hub_fits_on_serving_workers(variant: tuple[str, list[Object]]) -> None:
    """The hub's library downloads into HF_HOME, or HOME, where /tmp is too small for it."""
    (service,) = of_kind(variant[1], "RayService")
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    container = pod["containers"][0]
    (home,) = [each["value"] for each in container["env"] if each["name"] == "HF_HOME"]
    (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == home]
    assert not mount.get("readOnly")
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    # While an upgrade runs, the old model and the new one.
    assert quantity(volume["emptyDir"]["sizeLimit"]) > 2 * FROM_A_HUB


@pytest.mark.parametrize("overlay", ["gpu", "gpu+spot", "gpu+irsa", "gpu+kueue", "local"])
def test_a_trainings_temporary_volume_holds_a_checkpoint(overlay: str) -> None:
    """Of all the workers that share the pod, with moments in 8 bits too, which take the most."""
    (job,) = of_kind(objects := build(overlay), "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    spare = EXAMPLES if overlay.startswith("gpu") else 1e9
    volume, allowed = _temporary(group["template"]["spec"])
    for settings in _trainings(objects):
        workers = settings.workers.most
        with without_weights():
            preset = "6b" if settings.model.checkpoint else settings.model.preset
            model = settings.task_definition.head(GPTJConfig.preset(preset))
        in_a_pod = -(-workers // group["replicas"])
        most = settings.model_dump(exclude_unset=True)
        most["optimizer"]["moments"] = "8bit"
        parts = [
            room.checkpoint_bytes(Settings(**most), model, rank, workers) + room.SPARE_BYTES
            for rank in range(workers)
        ]
        assert sum(sorted(parts)[-in_a_pod:]) + spare <= allowed
        home = FROM_A_HUB if settings.model.checkpoint else 0
        assert allowed + home <= volume
    # The job's own process makes the examples too.
    volume, allowed = _temporary(cluster["headGroupSpec"]["template"]["spec"])
    assert spare <= allowed < volume


def _trainings(objects: list[Object]) -> list[Settings]:
    """The settings of the runs that a RayJob starts."""
    (config,) = [
        each["data"]
        for each in of_kind(objects, "ConfigMap")
        if each["metadata"]["name"].startswith("training-")
        and not each["metadata"]["name"].startswith("training-environment")
    ]
    if text := config.get("finetune.yaml"):
        return [Settings(**yaml.safe_load(text))]
    (pattern,) = re.findall(r"jobs/settings/\S+\.yaml", config["quickstart.sh"])
    found = [read_settings([str(each)]) for each in K8S.parent.glob(pattern)]
    assert len(found) == 3
    return found


def _temporary(pod: Object) -> tuple[float, float]:
    """Bytes of the volume where temporary files are, and how many of them ours may take."""
    container = pod["containers"][0]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    (mount,) = [
        each for each in container["volumeMounts"] if each["mountPath"] == variables["TMPDIR"]
    ]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    size = quantity(volume["emptyDir"]["sizeLimit"])
    assert quantity(container["resources"]["requests"]["ephemeral-storage"]) >= size
    return float(size), float(variables["GPTJ_SCRATCH_GB"]) * 1e9


GROWN = [(1, 2), (2, 3), (4, 6), (6, 9)]


@pytest.mark.parametrize(("replicas", "at_most"), GROWN)
def test_the_readme_states_the_replicas_of_an_incremental_upgrade(
    replicas: int, at_most: int
) -> None:
    """Serve's own rounding, in the order of KubeRay 1.7.0's reconcileServeTargetCapacity."""
    (service,) = of_kind(build("gpu+incremental-upgrade"), "RayService")
    surge = service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["maxSurgePercent"]
    old, new, most = 100, 0, 0
    while old > 0:
        if old + new > 100:
            old = max(0, old - surge)
        else:
            new = min(100, new + surge)
        most = max(most, sum(get_capacity_adjusted_num_replicas(replicas, c) for c in (old, new)))
    assert new == 100
    assert most == at_most
    text = (K8S / "README.md").read_text()
    assert f"| {replicas} | {2 * replicas} | {at_most} |" in text


def test_an_incremental_upgrade_follows_the_operators_rules() -> None:
    """ValidateClusterUpgradeOptions, and the names of createGateway and of Istio's deployment."""
    objects = build("gpu+incremental-upgrade")
    (service,), (ingress,) = of_kind(objects, "RayService"), of_kind(objects, "Ingress")
    cluster, strategy = service["spec"]["rayClusterConfig"], service["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert cluster["enableInTreeAutoscaling"] is True
    options = strategy["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0
    gateway = f"{service['metadata']['name']}-gateway"
    backend = {"name": f"{gateway}-{options['gatewayClassName']}", "port": {"number": 80}}
    for path in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"] == backend
    # Its pods are none of ours, and reach Serve's proxies all the same.
    pods = {"gateway.networking.k8s.io/gateway-name": gateway}
    (policy,) = [
        each["spec"]
        for each in of_kind(objects, "NetworkPolicy")
        if each["spec"]["podSelector"] and selects(each["spec"]["podSelector"], pods)
    ]
    serving = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert selects(policy["egress"][0]["to"][0]["podSelector"], serving)
    (admitted,) = [
        each["spec"]
        for each in of_kind(objects, "NetworkPolicy")
        if selects(each["spec"]["podSelector"], serving)
        and any(
            selects(peer.get("podSelector", {"matchLabels": {"none": "of these"}}), pods)
            for rule in each["spec"].get("ingress", [])
            for peer in rule["from"]
        )
    ]
    assert admitted["ingress"][0]["ports"] == [{"port": 8000, "protocol": "TCP"}]


def test_training_on_spot_machines_keeps_its_head_on_regular_ones() -> None:
    (job,) = of_kind(build("gpu+spot"), "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pod, head = workers["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gptj/pool": "training-spot"}
    assert {each["key"] for each in pod["tolerations"]} == {"nvidia.com/gpu", "gptj/spot"}
    assert "nodeSelector" not in head
    assert "tolerations" not in head
    assert pod["terminationGracePeriodSeconds"] < 30
    assert job["spec"]["backoffLimit"] > 3


@pytest.fixture(scope="module")
def team() -> list[Object]:
    return [
        each for part in ("namespace", "serving", "training") for each in kustomize(TEAM / part)
    ]


def test_a_teams_deployment_is_complete_and_in_its_own_namespace(
    team: list[Object], plain: list[Object]
) -> None:
    (namespace,) = of_kind(team, "Namespace")
    own = namespace["metadata"]["name"]
    assert own != "gptj"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for each in team:
        if each["kind"] not in schemas.CLUSTER_WIDE:
            assert each["metadata"]["namespace"] == own
    # All that others have, and what is a team's own.
    names = {(each["kind"], each["metadata"]["name"]) for each in team}
    others = {(each["kind"], each["metadata"]["name"]) for each in plain}
    assert others - names == {("Namespace", "gptj")}
    assert {kind for kind, _ in names - others} == {
        "LimitRange",
        "Namespace",
        "ResourceQuota",
        "RoleBinding",
    }
    known = ("ResourceQuota", "LimitRange", "RoleBinding", "Namespace", "Ingress")
    schemas.test_each_object_matches_kubernetes_schemas(of_kind(team, *known))
    schemas.test_each_ray_object_matches_kuberays_schema(team, "RayService")
    (ingress,), (gpu_ingress,) = of_kind(team, "Ingress"), of_kind(plain, "Ingress")
    assert ingress["spec"]["rules"][0]["host"] != gpu_ingress["spec"]["rules"][0]["host"]
    assert ingress["spec"]["tls"][0]["hosts"] == [ingress["spec"]["rules"][0]["host"]]
    # Members see all but secrets and train; they change no service, and no role of their own.
    bindings = [
        each
        for each in of_kind(team, "RoleBinding")
        if each["metadata"]["name"].startswith("members-")
    ]
    roles = {each["roleRef"]["name"] for each in bindings}
    assert roles == {"view", "rayjob-editor-role", "rayservice-viewer-role"}
    for binding in bindings:
        assert [(each["kind"], each["name"]) for each in binding["subjects"]] == [("Group", own)]
        assert binding["roleRef"]["kind"] == "ClusterRole"
    made = subprocess.run(
        [str(K8S / "secrets.sh"), "local", own], capture_output=True, text=True, check=True
    )
    for secret in yaml.safe_load_all(made.stdout):
        assert secret["metadata"]["namespace"] == own


def test_a_teams_quota_has_room_for_two_serving_clusters_and_a_training(
    team: list[Object],
) -> None:
    objects = team
    hard = named(objects, "ResourceQuota", "team")["spec"]["hard"]
    (service,), (job,) = of_kind(objects, "RayService"), of_kind(objects, "RayJob")
    counts: list[tuple[int, Object]] = []
    serving, training = service["spec"]["rayClusterConfig"], job["spec"]["rayClusterSpec"]
    for times, cluster in ((2, serving), (1, training)):
        counts.append((times, cluster["headGroupSpec"]["template"]))
        for group in cluster["workerGroupSpecs"]:
            counts.append((times * group["maxReplicas"], group["template"]))
    counts.append((1, job["spec"]["submitterPodTemplate"]))
    counts += [(1, each["spec"]["template"]) for each in of_kind(objects, "StatefulSet")]
    for resource in ("cpu", "memory"):
        needed = sum(
            times * quantity(container["resources"]["requests"][resource])
            for times, template in counts
            for container in template["spec"]["containers"]
        )
        autoscaler = serving["autoscalerOptions"]["resources"]["requests"][resource]
        needed += 2 * quantity(autoscaler)
        assert needed <= quantity(hard[f"requests.{resource}"]), resource
    assert sum(times for times, _ in counts) <= int(hard["pods"])


def test_root_file_systems_are_read_only_and_temporary_files_have_a_volume(
    objects: list[Object],
) -> None:
    """What is written goes to volumes: /tmp with HOME, Ray's logs, shared memory, data."""
    for template in templates(objects):
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            if container["name"] in ("redis", "autoscaler"):
                continue
            mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mounts["/tmp"]]
            assert volume["emptyDir"]["sizeLimit"]
    (service,) = of_kind(objects, "RayService")
    sidecar = service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert {"name": "temporary", "mountPath": "/tmp"} in sidecar["volumeMounts"]
    for init in (
        container
        for template in templates(objects)
        for container in template["spec"].get("initContainers", [])
    ):
        assert init["securityContext"]["readOnlyRootFilesystem"] is True
