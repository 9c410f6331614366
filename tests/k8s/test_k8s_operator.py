"""Our copy of KubeRay's operator against what the operator's own code builds, field by field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kuberay_operator as operator
import pytest
import yaml
from manifests import Object

GOLDEN: list[Object] = yaml.load(
    (Path(__file__).parent / "kuberay_golden" / "objects.yaml").read_text(), Loader=yaml.CSafeLoader
)
NAMES = [case["given"]["metadata"]["name"] for case in GOLDEN]


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Field by field, with what is empty as if it were not there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            found
            for key in sorted({*ours, *theirs})
            for found in differences(ours.get(key), theirs.get(key), f"{place}.{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            found
            for number, (one, other) in enumerate(zip(ours, theirs, strict=True))
            for found in differences(one, other, f"{place}[{number}]")
        ]
    if (ours or None) == (theirs or None) or (ours, theirs) in ((0, None), (None, 0)):
        return []
    return [f"{place}: ours {ours!r}, KubeRay's {theirs!r}"]


@pytest.mark.parametrize("case", GOLDEN, ids=NAMES)
def test_our_copy_of_the_operator_builds_the_same_objects(case: Object) -> None:
    given, made = case["given"], case["made"]
    cluster = operator.ray_cluster(given, "abcde")
    cluster["metadata"]["uid"] = "the-uid"
    if "serveServiceRefused" in made:
        with pytest.raises(operator.Refused) as refused:
            operator.serve_service(given, cluster)
        assert str(refused.value)[:35] == made["serveServiceRefused"][:35]
        return
    ours: Object = {
        "head": operator.head_pod(cluster),
        "workers": [
            operator.worker_pod(cluster, each) for each in cluster["spec"]["workerGroupSpecs"]
        ],
        "clusterHeadService": operator.head_service(cluster),
        "headService": operator.head_service(cluster, given),
        "role": {**made["role"], **operator.role(cluster)},
    }
    if given["kind"] == "RayService":
        ours["serveService"] = operator.serve_service(given, cluster)
        made["serveService"]["spec"]["ports"].sort(key=lambda each: each["name"])
    else:
        job = operator.submitter(given, cluster, f"{given['metadata']['name']}-fghij")
        template = job["spec"]["template"]
        (container,) = template["spec"]["containers"]
        ours["submitCommand"] = container["args"][0]
        # main.go stops before the controller writes these into the template.
        for key in ("command", "args", "env"):
            del container[key]
        for key in ("originated-from-cr-name", "originated-from-crd"):
            assert template["metadata"]["labels"].pop(f"ray.io/{key}")
        del template["metadata"]["labels"]["app.kubernetes.io/created-by"]
        ours["submitterTemplate"] = template
    assert differences(ours, made) == []


def test_a_difference_is_found_in_any_field() -> None:
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 2}]}) == [".a[0].b: ours 1, KubeRay's 2"]
    assert differences({"a": 1}, {}) == [".a: ours 1, KubeRay's None"]
    assert differences({"a": [1]}, {"a": [1, 2]}) != []
    assert differences({"a": {}, "b": None}, {}) == []


def test_each_cited_line_is_the_intended_one() -> None:
    """Its text is written down beside it: what a citation shows can be read without KubeRay."""
    folder = Path(__file__).parent
    cited: dict[str, str] = yaml.safe_load((folder / "kuberay_golden" / "cited.yaml").read_text())
    readme = (folder.parents[1] / "k8s" / "README.md").read_text()
    found = {
        f"{path}:{line}" for path, line in re.findall(r"kuberay/blob/v1\.7\.0/(\S+)#L(\d+)", readme)
    }
    assert readme.count("ray-project/kuberay/") == readme.count("kuberay/blob/v1.7.0/")
    for path, lines in re.findall(
        r"((?:\w+/)?\w+\.go)((?::\d+(?:,| and)? ?)+)",
        (folder.parent / "support" / "kuberay_operator.py").read_text(),
    ):
        for line in re.findall(r"\d+", lines):
            found.add(f"ray-operator/controllers/ray/{path}:{line}")
    assert found == cited.keys()
