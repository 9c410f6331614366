"""What KubeRay 1.7.0's operator builds from a RayService or RayJob: clusters, pods, services, jobs.

Each function does what one of the operator's does, which it names by file and line, of
https://github.com/ray-project/kuberay/tree/v1.7.0/ray-operator/controllers/ray. What the operator's
own code makes of manifests like ours is in tests/k8s/kuberay_golden, and compared with this. The
feature gates are those of the release; fields of a specification that ours do not use are not
followed, and refused.
"""

from __future__ import annotations

import re
from copy import deepcopy
from decimal import ROUND_CEILING, Decimal
from typing import Any

Object = dict[str, Any]

VERSION = "v1.7.0"  # utils/constant.go:365
DOMAIN = "cluster.local"  # utils/util.go:43
SHELL = ["/bin/bash", "-c", "--"]  # utils/util.go:1005
AUTOSCALER = (
    "ray kuberay-autoscaler --cluster-name $(RAY_CLUSTER_NAME)"
    " --cluster-namespace $(RAY_CLUSTER_NAMESPACE)"
)
DEFAULT_PORTS = {  # common/service.go:436
    "client": 10001,
    "gcs-server": 6379,
    "dashboard": 8265,
    "metrics": 8080,
    "serve": 8000,
}
NOT_FOLLOWED = {
    *("headService", "serveService", "networkPolicy", "tlsOptions", "historyServerOptions"),
    *("suspend", "managedBy", "clusterSelector", "submissionMode", "runtimeEnvYAML", "metadata"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "serviceType"),
    *("resources", "labels", "numOfHosts", "upgradeStrategy"),
}


class Refused(Exception):
    """The operator reports an error instead of making the object."""


def ray_cluster(owner: Object, suffix: str) -> Object:
    """The RayCluster of a RayService or RayJob; `suffix` is the random end of its name.

    rayservice_controller.go:1504, rayjob_controller.go:997, raycluster_controller.go:2422. Its
    annotations with the hash of its specification are left out.
    """
    service = owner["kind"] == "RayService"
    spec = deepcopy(owner["spec"]["rayClusterConfig" if service else "rayClusterSpec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        group["rayStartParams"] = group.get("rayStartParams") or {}
        assert not NOT_FOLLOWED & group.keys()
    assert not NOT_FOLLOWED & (spec.keys() | owner["spec"].keys()) - {"upgradeStrategy"}
    metadata = owner["metadata"]
    labels = {
        **metadata.get("labels", {}),
        "ray.io/originated-from-cr-name": metadata["name"],
        "ray.io/originated-from-crd": owner["kind"],
    }
    if not service:
        labels["ray.io/job-submission-mode"] = "K8sJobMode"  # the definition's default
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": f"{metadata['name']}-{suffix}",  # utils/util.go:369
            "namespace": metadata["namespace"],
            "labels": labels,
            "annotations": dict(metadata.get("annotations", {})),
        },
        "spec": spec,
    }


def compared(owner: Object) -> Object:
    """What of a RayService differs where KubeRay prepares a new cluster: utils/util.go:645."""
    spec = deepcopy(owner["spec"]["rayClusterConfig"])
    spec.pop("upgradeStrategy", None)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for name in ("tolerations", "schedulingGates"):
            group["template"]["spec"].pop(name, None)
    for group in spec["workerGroupSpecs"]:
        for name in ("replicas", "minReplicas", "maxReplicas", "scaleStrategy"):
            group.pop(name, None)
    return dict(spec)


def head_address(cluster: Object) -> str:
    """The name of a cluster's head in DNS: utils/util.go:332."""
    metadata = cluster["metadata"]
    return f"{metadata['name']}-head-svc.{metadata['namespace']}.svc.{DOMAIN}"


def head_port(cluster: Object) -> str:
    """common/pod.go:54"""
    return str(cluster["spec"]["headGroupSpec"]["rayStartParams"].get("port", "6379"))


def head_pod(cluster: Object) -> Object:
    """raycluster_controller.go:1717 and common/pod.go:214; the given cluster stays as it is."""
    cluster = deepcopy(cluster)
    spec, name = cluster["spec"], cluster["metadata"]["name"]
    group = spec["headGroupSpec"]
    parameters, template = group["rayStartParams"], group["template"]
    metadata, pod = template.setdefault("metadata", {}), template["spec"]
    ray = pod["containers"][0]
    metadata["generateName"] = f"{name[:50]}-head-"  # utils/util.go:203
    metadata["namespace"] = cluster["metadata"]["namespace"]
    metadata["labels"] = pod_labels("head", name, "headgroup", metadata.get("labels", {}))
    complete_parameters(parameters, cluster, "head")
    metadata.setdefault("annotations", {})
    if spec.get("enableInTreeAutoscaling"):
        parameters["no-monitor"] = "true"
        pod["serviceAccountName"] = clip(pod.get("serviceAccountName") or name)
        sidecar = autoscaler(ray["image"])
        if authenticates(spec):
            add_token(sidecar, name)
        merge_overrides(sidecar, spec.get("autoscalerOptions", {}))
        pod["containers"].append(sidecar)
        version = spec.get("autoscalerOptions", {}).get("version")
        if version is not None:
            add_variable(ray, "RAY_enable_autoscaler_v2", str(version == "v2").lower())
        if version == "v2":
            pod["restartPolicy"] = "Never"
    keep_state(template, cluster, "head")
    add_metrics_port(ray)
    if authenticates(spec):
        add_token(ray, name)
    return build_pod(template, cluster, "head", parameters)


def worker_pod(cluster: Object, group: Object, index: int = 0) -> Object:
    """raycluster_controller.go:1765 and common/pod.go:595; one of a group of `cluster`."""
    cluster, group = deepcopy(cluster), deepcopy(group)
    spec, name = cluster["spec"], cluster["metadata"]["name"]
    parameters, template = group["rayStartParams"], group["template"]
    metadata, pod = template.setdefault("metadata", {}), template["spec"]
    ray = pod["containers"][0]
    metadata["generateName"] = f"{name}-{group['groupName']}"[:50].lower() + "-worker-"
    metadata["namespace"] = cluster["metadata"]["namespace"]
    pod.setdefault("initContainers", []).append(wait_for_head(cluster, ray))
    metadata["labels"] = pod_labels("worker", name, group["groupName"], metadata.get("labels", {}))
    metadata["labels"]["ray.io/worker-group-replica-index"] = str(index)
    complete_parameters(parameters, cluster, "worker")
    metadata.setdefault("annotations", {})
    keep_state(template, cluster, "worker")
    add_metrics_port(ray)
    options = spec.get("autoscalerOptions", {})
    if spec.get("enableInTreeAutoscaling") and options.get("version") == "v2":
        pod["restartPolicy"] = "Never"
    if authenticates(spec):
        add_token(ray, name)
        for each in pod["initContainers"]:
            if each["name"] == "wait-gcs-ready":
                add_token(each, name)
    return build_pod(template, cluster, "worker", parameters)


def pod_labels(node: str, cluster: str, group: str, given: dict[str, str]) -> dict[str, str]:
    """common/pod.go:1167"""
    fixed = {
        "ray.io/cluster": cluster,
        "ray.io/node-type": node,
        "ray.io/group": group,
    }
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{cluster}-{node}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return labels | given | fixed


def complete_parameters(parameters: dict[str, str], cluster: Object, node: str) -> None:
    """common/pod.go:1345"""
    if node == "worker":
        parameters.setdefault("address", f"{head_address(cluster)}:{head_port(cluster)}")
    else:
        parameters.setdefault("dashboard-host", "0.0.0.0")
    parameters.setdefault("metrics-export-port", "8080")
    parameters["block"] = "true"
    parameters.setdefault("dashboard-agent-listen-port", "52365")


def authenticates(spec: Object) -> bool:
    """utils/util.go:796"""
    options = spec.get("authOptions", {})
    assert not options.get("enableK8sTokenAuth")
    assert not options.get("secretName")
    return bool(options.get("mode") == "token")


def add_variable(container: Object, name: str, value: str | Object) -> None:
    source = {"value": value} if isinstance(value, str) else {"valueFrom": value}
    container.setdefault("env", []).append({"name": name, **source})


def add_missing(container: Object, name: str, value: str | Object) -> None:
    if all(each["name"] != name for each in container.get("env", [])):
        add_variable(container, name, value)


def add_token(container: Object, cluster: str) -> None:
    """common/pod.go:387"""
    add_missing(container, "RAY_AUTH_MODE", "token")
    reference = {"name": clip(cluster), "key": "auth_token"}
    add_missing(container, "RAY_AUTH_TOKEN", {"secretKeyRef": reference})


def autoscaler(image: str) -> Object:
    """common/pod.go:935"""
    container: Object = {
        "name": "autoscaler",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": SHELL,
        "args": [AUTOSCALER],
        "resources": {
            "limits": {"cpu": "500m", "memory": "512Mi"},
            "requests": {"cpu": "500m", "memory": "512Mi"},
        },
    }
    add_variable(container, "RAY_CLUSTER_NAME", label("ray.io/cluster"))
    add_variable(container, "RAY_CLUSTER_NAMESPACE", field("metadata.namespace"))
    add_variable(container, "RAY_HEAD_POD_NAME", field("metadata.name"))
    add_variable(container, "KUBERAY_CRD_VER", "v1")
    add_variable(container, "KUBERAY_GEN_AUTOSCALER_START_CMD", AUTOSCALER)
    return container


def merge_overrides(container: Object, options: Object) -> None:
    """common/pod.go:1004"""
    for key in ("resources", "image", "imagePullPolicy", "securityContext", "command", "args"):
        if options.get(key):
            container[key] = deepcopy(options[key])
    for key in ("env", "envFrom", "volumeMounts"):
        if options.get(key):
            container.setdefault(key, []).extend(deepcopy(options[key]))


def keep_state(template: Object, cluster: Object, node: str) -> None:
    """What GCS fault tolerance adds: common/pod.go:77 and :117."""
    options = cluster["spec"].get("gcsFaultToleranceOptions")
    annotations, ray = template["metadata"]["annotations"], template["spec"]["containers"][0]
    if node == "head":
        annotations["ray.io/ft-enabled"] = str(options is not None).lower()
    if options is None:
        return
    assert not {"backend", "storage", "redisUsername", "externalStorageNamespace"} & options.keys()
    if node == "worker":
        add_missing(ray, "RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        return
    uid = cluster["metadata"].get("uid", "")
    annotations["ray.io/external-storage-namespace"] = uid
    add_missing(ray, "RAY_external_storage_namespace", uid)
    add_variable(ray, "RAY_REDIS_ADDRESS", options["redisAddress"])
    if "redisPassword" in options:
        parameters = cluster["spec"]["headGroupSpec"]["rayStartParams"]
        parameters["redis-password"] = "$REDIS_PASSWORD"
        password = options["redisPassword"]
        add_variable(ray, "REDIS_PASSWORD", password.get("valueFrom") or password["value"])


def add_metrics_port(ray: Object) -> None:
    """common/pod.go:289 and :689"""
    ports = ray.setdefault("ports", [])
    if all(each.get("name") != "metrics" for each in ports):
        ports.append({"name": "metrics", "containerPort": 8080})


def wait_for_head(cluster: Object, ray: Object) -> Object:
    """The init container of each worker: common/pod.go:609."""
    address = f"{head_address(cluster)}:{head_port(cluster)}"
    small = {"cpu": "200m", "memory": "256Mi"}
    container = {
        "name": "wait-gcs-ready",
        "image": ray["image"],
        "command": SHELL,
        "args": [
            f"""
					SECONDS=0
					while true; do
						if (( SECONDS <= 120 )); then
							if ray health-check --address {address} > /dev/null 2>&1; then
								echo "GCS is ready."
								break
							fi
							echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
						else
							if ray health-check --address {address}; then
								echo "GCS is ready. Any error messages above can be safely ignored."
								break
							fi
							echo "$SECONDS seconds elapsed: Still waiting for GCS to be ready. \
For troubleshooting, refer to the FAQ at \
https://docs.ray.io/en/master/cluster/kubernetes/troubleshooting.html."
						fi
						sleep 5
					done
				"""
        ],
        "resources": {"limits": small, "requests": small},
    }
    for key in ("imagePullPolicy", "securityContext", "env", "volumeMounts"):
        if key in ray:
            container[key] = deepcopy(ray[key])
    return container


def build_pod(template: Object, cluster: Object, node: str, parameters: dict[str, str]) -> Object:
    """common/pod.go:832"""
    metadata, pod = template["metadata"], template["spec"]
    serves = origin(cluster) == "RayService"
    if serves:
        metadata["labels"]["ray.io/serve"] = "false" if node == "head" else "true"
    ray, *others = pod["containers"]
    if "plasma-directory" not in parameters:
        add_volume(pod, ray, "shared-mem", "/dev/shm", "Memory")
    for sidecar in others:
        if sidecar["name"] == "autoscaler":
            add_volume(pod, ray, "ray-logs", "/tmp/ray")
            add_volume(pod, sidecar, "ray-logs", "/tmp/ray")
    assert "command" not in ray
    assert "args" not in ray
    start = start_command(node, parameters, ray.get("resources", {}))
    ray["command"] = SHELL
    ray["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]
    address = head_address(cluster)
    for container in pod.get("initContainers", []):
        add_variable(container, "FQ_RAY_IP", address)
        add_variable(container, "RAY_IP", address.split(".")[0])
    add_variables(ray, cluster, node, start)
    add_probes(ray, node, serves=serves, parameters=parameters)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


def origin(cluster: Object) -> str:
    return str(cluster["metadata"]["labels"]["ray.io/originated-from-crd"])


def add_volume(pod: Object, container: Object, name: str, path: str, medium: str = "") -> None:
    """common/pod.go:1548"""
    mounts = container.setdefault("volumeMounts", [])
    if any(each["mountPath"] == path for each in mounts):
        return
    volumes = pod.setdefault("volumes", [])
    if all(each["name"] != name for each in volumes):
        resources = container.get("resources", {})
        empty = {"medium": medium} if medium else {}
        for kind in ("limits", "requests"):
            if medium and "sizeLimit" not in empty and "memory" in resources.get(kind, {}):
                empty["sizeLimit"] = resources[kind]["memory"]
        volumes.append({"name": name, "emptyDir": empty})
    mounts.append({"name": name, "mountPath": path})


def start_command(node: str, parameters: dict[str, str], resources: Object) -> str:
    """`ray start` with what the container may use: common/pod.go:1390 and :1518."""
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for cpus in (limits.get("cpu"), requests.get("cpu")):
        if cpus is not None:
            parameters.setdefault("num-cpus", whole(cpus))
    if "memory" in limits:
        parameters.setdefault("memory", whole(limits["memory"]))
    for name in sorted(limits):
        if re.search(r"gpu$|nvidia\.com/mig-\d+g\.\d+gb$", name):  # utils/resources.go:8
            parameters.setdefault("num-gpus", whole(limits[name]))
    text = ""
    for name in sorted(parameters):
        value = parameters[name]
        if value.lower() not in ("true", "false") or name in (
            *("log-color", "include-dashboard", "include-log-monitor"),
        ):
            text += f" --{name}={value} "
        elif value.lower() == "true":
            text += f" --{name} "
    return f"ray start --head {text}" if node == "head" else f"ray start {text}"


def add_variables(ray: Object, cluster: Object, node: str, start: str) -> None:
    """common/pod.go:1207"""
    address = "127.0.0.1"
    if node == "worker":
        address = head_address(cluster)
        add_variable(ray, "FQ_RAY_IP", address)
        add_variable(ray, "RAY_IP", address.split(".")[0])
    add_variable(ray, "RAY_CLUSTER_NAME", label("ray.io/cluster"))
    add_variable(ray, "RAY_CLUSTER_NAMESPACE", field("metadata.namespace"))
    add_variable(ray, "RAY_CLOUD_INSTANCE_ID", field("metadata.name"))
    add_variable(ray, "RAY_NODE_TYPE_NAME", label("ray.io/group"))
    add_variable(ray, "KUBERAY_GEN_RAY_START_CMD", start)
    add_missing(ray, "RAY_PORT", head_port(cluster))
    if origin(cluster) == "RayService":
        add_missing(ray, "RAY_timeout_ms_task_wait_for_death_info", "0")
        add_missing(ray, "RAY_gcs_server_request_timeout_seconds", "5")
        add_missing(ray, "RAY_SERVE_KV_TIMEOUT_S", "5")
    add_missing(ray, "RAY_ADDRESS", f"{address}:{head_port(cluster)}")
    add_missing(ray, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    if node == "head":
        tags = f"kuberay_version={VERSION};kuberay_crd={origin(cluster)}"
        add_variable(ray, "RAY_USAGE_STATS_EXTRA_TAGS", tags)
    add_missing(ray, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")


def add_probes(ray: Object, node: str, *, serves: bool, parameters: dict[str, str]) -> None:
    """Where the manifest has none, for Ray from 2.53 on: common/pod.go:732."""
    port = int(parameters["dashboard-agent-listen-port"])
    asks: Object = {"httpGet": {"path": "/api/healthz", "port": port}}
    seconds = 5 if node == "head" else 2
    common = {"timeoutSeconds": seconds, "periodSeconds": 5, "successThreshold": 1}
    if "livenessProbe" not in ray:
        ray["livenessProbe"] = {
            **asks,
            **common,
            "initialDelaySeconds": 30,
            "failureThreshold": 120,
        }
    if "readinessProbe" not in ray:
        probe = {**asks, **common, "initialDelaySeconds": 10, "failureThreshold": 10}
        if serves and node == "worker":
            (serve,) = [
                each["containerPort"] for each in ray["ports"] if each.get("name") == "serve"
            ] or [8000]
            healthy = "wget --tries 1 -T {} -q -O- http://localhost:{}/{} | grep success"
            raylet = healthy.format(2, port, "api/local_raylet_healthz")
            proxy = healthy.format(10, serve, "-/healthz")
            del probe["httpGet"]
            probe["exec"] = {"command": ["bash", "-c", f"{raylet} && {proxy}"]}
            probe["failureThreshold"] = 1
        ray["readinessProbe"] = probe


def field(path: str) -> Object:
    return {"fieldRef": {"fieldPath": path}}


def label(name: str) -> Object:
    return field(f"metadata.labels['{name}']")


def clip(name: str) -> str:
    """utils/util.go:221"""
    name = name[-50:]
    return f"r{name[1:]}" if not name[0].isalpha() else name


def quantity(text: str) -> Decimal:
    """Kubernetes' notation of an amount: 500m, 4Gi."""
    powers = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert found, text
    if found[2] == "m":
        return Decimal(found[1]) / 1000
    return Decimal(found[1]) * powers[found[2]]


def whole(text: str) -> str:
    """As Quantity.Value(): rounded up."""
    return str(int(quantity(text).to_integral_value(ROUND_CEILING)))


def service_ports(cluster: Object) -> dict[str, int]:
    """common/service.go:403: the ports of the head's container, and one of metrics."""
    given = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports", [])
    ports = {
        each.get("name") or f"{each['containerPort']}-port": each["containerPort"] for each in given
    }
    return {"metrics": 8080} | (ports or DEFAULT_PORTS)


def head_service(cluster: Object, owner: Object | None = None) -> Object:
    """A cluster's own, or with `owner` that of a RayService or RayJob, which follows it.

    common/service.go:37 and :147, common/job.go:24, raycluster_controller.go:609.
    """
    name = cluster["metadata"]["name"]
    labels = cluster["spec"]["headGroupSpec"]["template"].get("metadata", {}).get("labels", {})
    selector = {
        "ray.io/cluster": name,
        "ray.io/node-type": "head",
        "ray.io/identifier": f"{name}-head",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    if owner is None and "app.kubernetes.io/name" in labels:
        selector["app.kubernetes.io/name"] = labels["app.kubernetes.io/name"]
    metadata: Object = {"name": f"{name}-head-svc", "labels": selector}
    if owner is not None:
        owned = owner["metadata"]["name"]
        metadata = {
            "name": f"{owned}-head-svc",
            "labels": {
                "ray.io/originated-from-cr-name": owned,
                "ray.io/originated-from-crd": owner["kind"],
                "ray.io/node-type": "head",
                "ray.io/identifier": f"{owned}-head",
            },
        }
    return {
        "metadata": {**metadata, "namespace": cluster["metadata"]["namespace"]},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [
                {"name": each, "port": port, "appProtocol": "tcp"}
                for each, port in sorted(service_ports(cluster).items())
            ],
        },
    }


def serve_service(owner: Object, cluster: Object) -> Object:
    """Where requests go: common/service.go:181.

    Raises Refused where the head's container has no port for it, which ends the operator's work on
    the RayService.
    """
    name = owner["metadata"]["name"]
    ports = [
        {"name": each, "port": port}
        for each, port in sorted(service_ports(cluster).items())
        if each == "serve" or each.startswith("serve-")
    ]
    if not ports:
        raise Refused("Please specify a port named 'serve' in the Ray head container")
    return {
        "metadata": {
            "name": f"{name}-serve-svc",
            "namespace": owner["metadata"]["namespace"],
            "labels": {
                "ray.io/originated-from-cr-name": name,
                "ray.io/originated-from-crd": owner["kind"],
                "ray.io/serve": f"{name}-serve",
            },
        },
        "spec": {
            "selector": {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/serve": "true"},
            "ports": ports,
        },
    }


def submitter(job: Object, cluster: Object, submission: str) -> Object:
    """The Kubernetes Job that submits a RayJob's entrypoint as `submission`.

    rayjob_controller.go:587, :634 and :716, common/job.go:90.
    """
    metadata = job["metadata"]
    template = deepcopy(job["spec"]["submitterPodTemplate"])
    container = template["spec"]["containers"][0]
    dashboard = f"{head_address(cluster)}:{service_ports(cluster)['dashboard']}"
    if not container.get("command"):
        container["command"] = ["/bin/bash", "-ce", "--"]
        entrypoint = job["spec"]["entrypoint"].strip()
        container["args"] = [submit_command(f"http://{dashboard}", submission, entrypoint)]
    add_variable(container, "PYTHONUNBUFFERED", "1")
    add_variable(container, "RAY_DASHBOARD_ADDRESS", dashboard)
    add_variable(container, "RAY_JOB_SUBMISSION_ID", submission)
    if authenticates(cluster["spec"]):
        add_token(container, cluster["metadata"]["name"])
    labels = {
        "ray.io/originated-from-cr-name": metadata["name"],
        "ray.io/originated-from-crd": "RayJob",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    template.setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    retries = job["spec"].get("submitterConfig", {}).get("backoffLimit", 2)
    return {
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "labels": labels,
        },
        "spec": {"backoffLimit": retries, "template": template},
    }


def submit_command(address: str, submission: str, entrypoint: str) -> str:
    """common/job.go:90, without a runtime environment, metadata or resources."""
    healthy = (
        'python -c "import urllib.request; '
        f"r=urllib.request.urlopen('{address}/api/gcs_healthz', timeout=10); "
        "exit(0 if b'success' in r.read() else 1)\""
    )
    return " ".join(
        [
            f"until {healthy} >/dev/null 2>&1 ;",
            f'do echo "Waiting for Ray Dashboard GCS to become healthy at {address} ..." ;',
            "sleep 2 ; done ;",
            f"if ! ray job status --address {address} {submission} >/dev/null 2>&1 ;",
            f"then ray job submit --address {address} --no-wait --submission-id {submission}",
            f"-- {entrypoint} ; fi ;",
            f"ray job logs --address {address} --follow {submission}",
        ]
    )


def redis_cleanup(cluster: Object) -> Object:
    """The Job that ends a deleted cluster's state in Redis: raycluster_controller.go:1807.

    Its command, which asks Ray to do so, is left out.
    """
    pod = head_pod(cluster)
    metadata, spec = pod["metadata"], pod["spec"]
    metadata["labels"]["ray.io/node-type"] = "redis-cleanup"
    ray = spec["containers"][0]
    spec["containers"] = [ray]
    for key in ("livenessProbe", "readinessProbe", "args"):
        del ray[key]
    add_variable(ray, "RAY_redis_db_connect_retries", "120")
    add_variable(ray, "RAY_redis_db_connect_wait_milliseconds", "500")
    small = {"cpu": "200m", "memory": "256Mi"}
    ray["resources"] = {"limits": small, "requests": small}
    spec["restartPolicy"] = "Never"
    name = f"{cluster['metadata']['name']}-redis-cleanup"[-63:]
    return {
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "labels": metadata["labels"],
            "annotations": metadata["annotations"],
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": 300,
            "template": {"metadata": metadata, "spec": spec},
        },
    }


def role(cluster: Object) -> Object:
    """What the autoscaler may do: common/rbac.go:30."""
    return {
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["pods"],
                "verbs": ["get", "list", "watch", "patch"],
            },
            {"apiGroups": [""], "resources": ["pods/resize"], "verbs": ["patch"]},
            {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "patch"]},
        ]
    }
