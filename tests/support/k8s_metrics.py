"""The metrics that rules and dashboards name, and which of them an export does not have.

For a test with a live cluster, whose text Prometheus would read:

    assert missing(exported(text), [*rules(), *panels("serving"), *panels("engine")]) == []
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring"

# Words of PromQL in our expressions; every other word must be a metric or a label.
FUNCTIONS = {
    *("sum", "avg", "max", "min", "count", "by", "without"),
    *("rate", "increase", "changes", "histogram_quantile", "clamp_min"),
    *("absent", "unless", "on", "or", "vector"),
}
# What is not Ray's, with its labels: KubeRay's as in ray-operator/controllers/ray/metrics of 1.7.0
# (ray_service_metrics.go:28, ray_job_metrics.go:31), those of pods as in kube-state-metrics'
# docs/metrics/workload/pod-metrics.md.
OF_OPERATORS = {
    "kuberay_service_info": {"name", "namespace", "uid"},
    "kuberay_service_condition_ready": {"name", "namespace", "uid", "condition"},
    "kuberay_service_condition_upgrade_in_progress": {"name", "namespace", "uid", "condition"},
    "kuberay_job_deployment_status": {"name", "namespace", "uid", "deployment_status"},
    "kube_pod_container_status_ready": {"container", "pod", "namespace", "uid"},
    "kube_pod_container_status_terminated": {"container", "pod", "namespace", "uid"},
}
# Labels that Prometheus adds when it reads a pod.
OF_THE_SCRAPE = {"pod", "namespace", "instance", "job", "container"}


@dataclass(frozen=True)
class Expression:
    """One PromQL expression, and where it is."""

    place: str
    text: str

    def metrics(self) -> set[str]:
        """The names in it that are metrics."""
        bare = re.sub(r'"[^"]*"', "", self.text)
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)  # selectors and ranges
        bare = re.sub(r"\b(by|without|on)\s*\([^)]*\)", " ", bare)
        return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - FUNCTIONS

    def labels(self) -> set[str]:
        """The labels that it selects or groups by."""
        bare = re.sub(r'"[^"]*"', '""', self.text)
        selected = re.findall(r'([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*""', bare)
        grouped = re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", bare)
        return {*selected, *(label.strip() for group in grouped for label in group.split(","))}


def rules() -> list[Expression]:
    """Of all alerts."""
    document = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    return [
        Expression(f"the alert {rule['alert']}", rule["expr"])
        for group in document["spec"]["groups"]
        for rule in group["rules"]
    ]


def panels(dashboard: str) -> list[Expression]:
    """Of one dashboard: serving, engine or training."""
    document = json.loads((MONITORING / "dashboards" / f"{dashboard}.json").read_text())
    return [
        Expression(f"{dashboard}.json, panel {panel['title']!r}", target["expr"])
        for panel in document["panels"]
        for target in panel["targets"]
    ]


def exported(text: str) -> dict[str, set[str]]:
    """The names of an export's samples, with all labels that each has."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def missing(
    export: Mapping[str, set[str]],
    expressions: Iterable[Expression],
    *,
    uncounted: Iterable[str] = (),
    gpus: bool = False,
) -> list[str]:
    """What the expressions name and the export does not have: metrics, and labels of theirs.

    Args:
        export: as from `exported`.
        uncounted: counters of ours that are exported once they have counted something, which
            did not happen in this cluster.
        gpus: whether the export is of a cluster with GPUs; without, what Ray says of GPUs is
            looked up in its list of what it reports.
    """
    faults = []
    for expression in expressions:
        labels: set[str] | None = set(OF_THE_SCRAPE)
        for metric in sorted(expression.metrics()):
            if not gpus and "_gpus_" in metric:
                if metric.removeprefix("ray_") not in _of_ray_nodes():
                    faults.append(f"{expression.place}: Ray reports no {metric}")
            elif metric in OF_OPERATORS:
                if labels is not None:
                    labels |= OF_OPERATORS[metric]
            elif metric in uncounted:
                labels = None  # which it has shows with its first count
            elif metric not in export:
                faults.append(f"{expression.place}: no {metric} is exported")
            elif labels is not None:
                labels |= export[metric]
        if labels is not None:
            for label in sorted(expression.labels() - labels):
                faults.append(f"{expression.place}: none of its metrics has a label {label}")
    return faults


def _of_ray_nodes() -> Mapping[str, object]:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return METRICS_GAUGES
