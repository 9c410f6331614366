"""The commands of k8s/README.md, as far as they can be checked without a cluster."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import kuberay_operator
import pytest
import yaml
from kuberay_operator import quantity
from manifests import K8S, ROOT, Object, made_clusters, of_kind, program, templates

pytestmark = pytest.mark.slow  # kubectl builds the manifests

README = (K8S / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    """Each command of the code blocks, and those within $(…) and behind a pipe, as words."""
    found = []
    for block in BLOCKS[:-1]:  # the last one lists files
        text = block.replace("\\\n", " ")
        text = re.sub(r"\$\(|\)\"|\)$|[|&]{1,2} ", "\n", text, flags=re.M)
        for line in text.splitlines():
            words = shlex.split(line.replace('"', "").strip(" &"), posix=False)
            while words and re.match(r"[A-Za-z_]+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@cache
def help_of(*subcommand: str) -> str:
    kubectl = program()[0]
    done = subprocess.run([kubectl, *subcommand, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, subcommand
    options = subprocess.run([kubectl, "options"], capture_output=True, text=True, check=True)
    return done.stdout + options.stdout


def test_kubectl_knows_each_command_and_its_flags() -> None:
    checked = 0
    for words in commands():
        if words[0] != "kubectl":
            continue
        rest = words[1:]
        if rest[0] == "-n":
            assert rest[1] in ("gptj", "kuberay-system")
            rest = rest[2:]
        # `create secret generic` and `rollout restart` are subcommands of subcommands.
        depth = {"create": 3, "rollout": 2}.get(rest[0], 1) if rest[1] != "-f" else 1
        text = help_of(*rest[:depth])
        for word in rest:
            if re.match(r"--?[a-z]", word):
                flag = word.partition("=")[0]
                assert re.search(rf"(^|[\s,]){re.escape(flag)}[=, ]", text), (words, flag)
                checked += 1
    assert checked > 15


def test_files_folders_and_objects_in_the_commands_exist(objects: list[Object]) -> None:
    names = {(each["kind"].lower(), each["metadata"]["name"]) for each in objects}
    service = of_kind(objects, "RayService")[0]["metadata"]["name"]
    made_by_kuberay = {
        ("service", f"{service}-serve-svc"),
        ("job", of_kind(objects, "RayJob")[0]["metadata"]["name"]),
    }
    secrets = {("secret", name) for name in ("s3", "redis", "api-keys")}
    for words in commands():
        for word in words:
            if re.match(r"(k8s|jobs|platform)/", word):
                assert (ROOT / word).exists(), word
        text = " ".join(words)
        for kind, name in re.findall(
            r"\b(rayservice|rayjob|secret generic|secret|statefulset|service|job)[/ ]([a-z][\w-]+)",
            text,
        ):
            key = (kind.removesuffix(" generic"), name)
            if name not in ("generic", "gptj-platform"):
                assert key in names | made_by_kuberay | secrets, text


def test_image_names_and_build_arguments_match_the_manifests() -> None:
    dockerfile = (K8S / "Dockerfile").read_text()
    built = [words for words in commands() if words[:2] == ["docker", "build"]]
    assert len(built) == 2
    for words in built:
        (argument,) = [word for word in words if word.startswith("VARIANT=")]
        variant = argument.partition("=")[2]
        assert f"AS run-{variant}" in dockerfile
        tag = words[words.index("-t") + 1]
        overlay = {"cpu": "local", "cuda": "gpu"}[variant]
        folder = K8S / "overlays" / overlay / "kustomization.yaml"
        (image,) = [
            each
            for each in yaml.safe_load(folder.read_text())["images"]
            if each["name"] == "gptj-platform"
        ]
        assert tag == f"{image.get('newName', image['name'])}:{image['newTag']}"


def test_rotating_api_keys_creates_the_secret_that_pods_read(tmp_path: Path) -> None:
    """The README's command itself, up to the pipe."""
    command = r"^kubectl .*create secret generic api-keys .*\$new.*\\\n.*-o yaml"
    (line,) = re.findall(command, README, re.M)
    done = subprocess.run(
        ["bash", "-c", line.replace("kubectl", program()[0], 1)],
        env={"new": "new-key", "old": "old-key", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    secret = yaml.safe_load(done.stdout)
    assert secret["metadata"]["name"] == "api-keys"
    assert set(secret["data"]) == {"GPTJ_API_KEYS"}


def test_places_to_edit_are_found_by_the_readmes_search() -> None:
    (pattern,) = re.findall(r"^grep -rn '([^']+)' k8s$", README, re.M)
    command = ["grep", "-rln", pattern, "k8s"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {
        "k8s/overlays/gpu/place.yaml",
        "k8s/training/overlays/gpu/finetune.yaml",
        "k8s/training/overlays/gpu/kustomization.yaml",
        "k8s/overlays/gpu/kustomization.yaml",
        "k8s/base/ingress.yaml",
    } <= set(found)


def test_the_readme_states_the_local_pods_total_requests(objects: list[Object]) -> None:
    if "nvidia.com/gpu" in str(objects):
        return
    ((cpus, memory),) = re.findall(r"the pods ask for (\d+) CPUs and (\d+) GiB", README)
    asked = {"cpu": Decimal(0), "memory": Decimal(0)}
    for template in templates(objects):
        labels = template["metadata"]["labels"]
        if labels.get("ray.io/node-type") == "redis-cleanup":
            continue  # at its end
        count = 2 if labels["app.kubernetes.io/component"] == "serving-worker" else 1
        for container in template["spec"]["containers"]:
            for kind in asked:
                asked[kind] += count * quantity(container["resources"]["requests"][kind])
    assert int(cpus) - 1 < asked["cpu"] <= int(cpus)
    assert int(memory) - 1 < asked["memory"] / 2**30 <= int(memory)


def test_troubleshooting_commands_query_the_pending_cluster(objects: list[Object]) -> None:
    """On a first deployment there is no active one, and no service of the RayService's head."""
    (block,) = [each for each in BLOCKS if "serve status" in each]
    assert block.index("pendingServiceStatus") < block.index("activeServiceStatus")
    assert "gptj-head-svc" not in block
    _, cluster = next(made_clusters(objects))
    head = kuberay_operator.head_service(cluster)
    assert head["metadata"]["name"] == f"{cluster['metadata']['name']}-head-svc"
    assert {port["port"] for port in head["spec"]["ports"]} >= {8265}


def test_the_patch_of_a_running_cluster_matches_its_fields(objects: list[Object]) -> None:
    (patch,) = re.findall(r"patch raycluster .*-p '(\[.*?\])'", README.replace("\\\n", " "))
    (operation,) = json.loads(patch)
    found: Any = next(made_clusters(objects))[1]
    for key in operation["path"].strip("/").split("/"):
        found = found[int(key) if key.isdigit() else key]
    assert type(found) is type(operation["value"])
    assert operation["op"] == "replace"
