"""What the manifests allow: to pods, to accounts, over the network."""

from __future__ import annotations

import ipaddress
import re
import subprocess

import pytest
import yaml
from manifests import (
    K8S,
    Object,
    component,
    containers,
    named,
    of_kind,
    selects,
    templates,
)

pytestmark = pytest.mark.slow  # kubectl builds the manifests


def test_every_pod_passes_the_restricted_standard(objects: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, "Restricted"."""
    namespace = named(objects, "Namespace", "gptj")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in templates(objects):
        pod = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"sysctls", "windowsOptions"} & security.keys()
        allowed = {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim"}
        for volume in pod.get("volumes", []):
            assert set(volume) - {"name"} <= allowed
    for _, container in containers(objects):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not {"privileged", "procMount", "runAsUser", "seccompProfile"} & security.keys()
        assert not any("hostPort" in port for port in container.get("ports", []))


def test_manifests_contain_no_secrets(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")
    for _, container in containers(objects):
        for variable in container.get("env", []):
            if variable["name"] == "RAY_AUTH_MODE":
                assert variable["value"] == "token"
            elif variable["name"] == "GPTJ_KEYS_FILE":
                assert variable["value"].startswith("/etc/gptj/keys/")  # a secret's
            elif re.search(r"KEY|SECRET|PASSWORD|TOKEN|AUTH", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, variable["name"]
    for each in of_kind(objects, "ConfigMap"):
        for name, text in each["data"].items():
            assert not re.search(r"(?i)password|passwd|secret|api_key|token_", name), name
            assert not re.search(
                r"(?im)^\s*(requirepass|masterauth)|(?:password|secret)\s*[:=]", text
            )


def test_each_run_draws_new_secrets() -> None:
    done = subprocess.run([str(K8S / "secrets.sh"), "local"], capture_output=True, text=True)
    again = subprocess.run([str(K8S / "secrets.sh"), "local"], capture_output=True, text=True)
    for one, other in zip(
        yaml.safe_load_all(done.stdout), yaml.safe_load_all(again.stdout), strict=True
    ):
        for key, value in (one.get("stringData") or one["data"]).items():
            assert value != (other.get("stringData") or other["data"])[key], "a default"


def test_service_accounts_have_no_rights_and_no_token(objects: list[Object]) -> None:
    """But the head's, which KubeRay lets start workers; test_budget.py has its own role."""
    assert not of_kind(objects, "ClusterRole", "ClusterRoleBinding")
    for each in of_kind(objects, "Role", "RoleBinding"):
        assert each["metadata"]["name"] == "serving-head"
    for account in of_kind(objects, "ServiceAccount"):
        head = account["metadata"]["name"] == "serving-head"
        assert account["automountServiceAccountToken"] is head
    for template in templates(objects):
        named(objects, "ServiceAccount", template["spec"]["serviceAccountName"])
        token = template["spec"].get("automountServiceAccountToken", True)
        assert token is (component(template) == "serving-head")


PEERS = {
    "ingress": ({}, {"kubernetes.io/metadata.name": "traefik"}),
    "operator": (
        {"app.kubernetes.io/name": "kuberay-operator"},
        {"kubernetes.io/metadata.name": "kuberay-system"},
    ),
    "dns": ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}),
    "monitoring": ({}, {"kubernetes.io/metadata.name": "monitoring"}),
    "stranger": ({}, {"kubernetes.io/metadata.name": "default"}),
}
OURS = {"kubernetes.io/metadata.name": "gptj"}


def reaches(objects: list[Object], source: str, target: str, port: int) -> bool:
    """Whether a connection may be made, by pods' components, peers' names or an address."""
    labels = {component(each): each["metadata"]["labels"] for each in templates(objects)}

    def side(direction: str, own: str, other: str) -> bool:
        if own in PEERS or own[0].isdigit():
            return True  # outside our namespace
        policies = [
            each["spec"]
            for each in of_kind(objects, "NetworkPolicy")
            if direction.capitalize() in each["spec"]["policyTypes"]
            and selects(each["spec"]["podSelector"], labels[own])
        ]
        assert policies, f"nothing holds {own} back"
        key = "from" if direction == "ingress" else "to"
        return any(
            any(matches(peer, other) for peer in rule[key])
            and any(each["port"] == port for each in rule.get("ports", [{"port": port}]))
            for policy in policies
            for rule in policy.get(direction, [])
        )

    def matches(peer: Object, other: str) -> bool:
        if "ipBlock" in peer:
            return other[0].isdigit() and in_block(other, peer["ipBlock"])
        if other[0].isdigit():
            return False
        pod, space = PEERS.get(other, (labels.get(other, {}), OURS))
        if "namespaceSelector" not in peer and space is not OURS:
            return False
        return selects(peer.get("namespaceSelector", {}), space) and selects(
            peer.get("podSelector", {}), pod
        )

    return side("egress", source, target) and side("ingress", target, source)


def in_block(address: str, block: Object) -> bool:
    where = ipaddress.ip_address(address)
    return where in ipaddress.ip_network(block["cidr"]) and not any(
        where in ipaddress.ip_network(each) for each in block.get("except", [])
    )


def test_with_cilium_the_head_reaches_the_api_server_as_an_entity(objects: list[Object]) -> None:
    """https://github.com/cilium/cilium/issues/14724: an address block does not match it."""
    labels = {component(each): each["metadata"]["labels"] for each in templates(objects)}
    for each in of_kind(objects, "CiliumNetworkPolicy"):
        spec = each["spec"]
        (rule,) = spec["egress"]
        assert rule["toEntities"] == ["kube-apiserver"]
        ports = {port["port"] for port in rule["toPorts"][0]["ports"]}
        kubernetes = named(objects, "NetworkPolicy", "api-server")["spec"]["egress"][0]["ports"]
        assert ports == {str(port["port"]) for port in kubernetes}
        chosen = {name for name in labels if selects(spec["endpointSelector"], labels[name])}
        assert chosen == {"serving-head"}


def test_only_the_needed_connections_are_allowed(objects: list[Object]) -> None:
    local = bool(
        [
            each
            for each in of_kind(objects, "StatefulSet")
            if each["metadata"]["name"] == "seaweedfs"
        ]
    )
    wanted = {
        ("ingress", "serving-worker", 8000),
        ("operator", "serving-head", 8265),
        ("operator", "training-head", 8265),
        ("training-submitter", "training-head", 8265),
        ("serving-worker", "serving-head", 6379),
        ("serving-head", "serving-worker", 10002),
        ("training-worker", "training-head", 6379),
        ("serving-head", "redis", 6379),
        ("serving-worker", "dns", 53),
        ("redis", "dns", 53),
        ("serving-worker", "52.216.0.1", 443),
        ("training-worker", "52.216.0.1", 443),
        ("training-head", "52.216.0.1", 443),
        ("serving-head", "10.96.0.1", 443),
        ("serving-head", "172.18.0.2", 6443),
    }
    if local:
        wanted |= {(f"{each}", "s3", 8333) for each in ("serving-worker", "training-worker")}
    else:
        wanted |= {("monitoring", "serving-worker", 8080), ("monitoring", "training-head", 8080)}
    unwanted = {
        ("stranger", "serving-worker", 8000),
        ("ingress", "serving-head", 8265),
        ("ingress", "serving-head", 8000),
        ("ingress", "serving-worker", 52365),
        ("stranger", "serving-head", 8265),
        ("stranger", "serving-head", 6379),
        ("monitoring", "serving-head", 8265),
        ("training-worker", "serving-head", 6379),
        ("training-head", "serving-worker", 8000),
        ("serving-worker", "redis", 6379),
        ("training-head", "redis", 6379),
        ("stranger", "redis", 6379),
        ("redis", "52.216.0.1", 443),
        ("serving-worker", "169.254.169.254", 80),
        ("serving-worker", "169.254.169.254", 443),
        ("serving-worker", "10.96.0.1", 443),
        ("operator", "serving-head", 8000),
        ("serving-worker", "169.254.20.10", 80),
        ("serving-worker", "52.216.0.1", 80),
    }
    node_local = {("serving-worker", "169.254.20.10", 53), ("redis", "169.254.20.10", 53)}
    if any(each["metadata"]["name"] == "node-local-dns" for each in objects):
        wanted |= node_local
    else:
        unwanted |= node_local
    for each in wanted:
        assert reaches(objects, *each), each
    for each in unwanted:
        assert not reaches(objects, *each), each
